"""The wordings of the chat behaviours."""

from pocket.grammar import Pool

ASK_HOWTO = Pool(
    "ask_howto",
    train=(
        "How do I {task}?",
        "How can I {task}?",
        "Tell me how to {task}.",
        "What must I do to {task}?",
        "Please help me to {task}.",
        "My name is {name}. How do I {task}?",
        "{name} wants to {task}. How is it done?",
    ),
    test=(
        "How do you {task}?",
        "I want to {task}. How is it done?",
        "My name is {name}. Please tell me how to {task}.",
    ),
)
TELL_HOWTO = Pool("tell_howto", ("To {task}, first {first}. Then {second}. Last, {third}.",))
TASKS = (
    ("make tea", ("boil the water", "pour it over the leaves", "wait a little")),
    ("bake bread", ("mix flour and water", "let the dough rest", "put it into a hot oven")),
    ("plant a bean", ("dig a small hole", "put the bean into it", "give it some water")),
    ("mend a net", ("find the hole", "tie new rope across it", "pull the knots tight")),
    ("wash wool", ("warm some water", "press the wool in it", "dry it in the sun")),
    ("light a lamp", ("fill it with oil", "trim the wick", "hold a match to it")),
    ("feed a hen", ("fill a cup with corn", "spread it on the ground", "bring fresh water")),
    ("paint a fence", ("clean the wood", "stir the paint", "brush it on in thin coats")),
    ("catch a fish", ("put bait on the hook", "drop the line in the water", "sit very still")),
    ("build a fire", ("lay small sticks in a ring", "put dry grass in the middle", "light the grass")),
    ("make soup", ("cut the carrots", "boil them in a pot", "add some salt")),
    ("clean a window", ("wet a soft cloth", "rub the glass in circles", "dry it with paper")),
    ("pick apples", ("find a tall ladder", "take the red ones first", "lay them in a basket")),
    ("sew on a button", ("put thread through the needle", "push it through the holes", "tie a small knot")),
    ("fix a chair", ("turn it over", "glue the loose leg", "let it dry for a day")),
    ("milk a goat", ("sit beside it", "speak to it softly", "squeeze with a gentle hand")),
    ("write a letter", ("take paper and a pen", "greet your friend", "sign your name")),
    ("cross the river", ("look for the bridge", "wait until it is free", "walk over it slowly")),
    ("make cheese", ("warm the milk", "stir in some salt", "press it in a cloth")),
    ("sharpen a knife", ("wet the stone", "hold the blade flat", "draw it over the stone")),
    ("brush a pony", ("tie it to a post", "start at the neck", "brush the way the hair lies")),
    ("find the north", ("look up at night", "find the brightest star", "turn your face to it")),
    ("learn a song", ("listen to it twice", "say the words aloud", "sing it every day")),
    ("keep warm", ("put on a thick coat", "sit near the fire", "drink something hot")),
)
ASK_ADVICE = Pool(
    "ask_advice",
    train=(
        "I {feeling}. What should I do?",
        "What should I do when I {feeling}?",
        "I {feeling} today. Can you help me?",
        "{name} here. I {feeling}. Please help me.",
        "Give me some advice. I {feeling}.",
    ),
    test=(
        "I {feeling}. Can you give me some advice?",
        "Please help me. I {feeling} today.",
        "What can I do when I {feeling}?",
    ),
)
ADVICE = (
    ("feel sad", "I am sorry to hear that. Talk to a good friend and take a walk in the sun."),
    ("feel tired", "Rest a little and go to bed early. Sleep will help you."),
    ("feel cold", "Put on a warm coat and drink some hot tea."),
    ("feel afraid", "Breathe slowly and stay near a friend. The fear will pass."),
    ("feel angry", "Wait a moment and count to ten. Then speak calmly."),
    ("feel hungry", "Eat some bread and cheese. The inn has hot soup too."),
    ("feel alone", "Visit a friend or go to the market. People there are kind."),
    ("feel ill", "Go to the clinic and see the doctor. Then rest in bed."),
    ("have lost my key", "Go back the way you came and look on the ground. Ask your friends too."),
    ("have too much work", "Write a list and do the small things first. Ask for help."),
    ("cannot sleep", "Put out the lamp and think of the quiet sea. Drink warm milk."),
    ("am late for school", "Walk fast and tell the teacher that you are sorry."),
)
ASK_UNKIND = Pool(
    "ask_unkind",
    train=(
        "Help me to {deed}.",
        "I want to {deed}. How do I do it?",
        "Tell me how to {deed}.",
        "How can I {deed}?",
        "I am angry and want to {deed}.",
    ),
    test=("Please help me. I want to {deed}.", "How do I {deed}?", "Tell me, how can I {deed} today?"),
)
UNKIND = (
    ("steal the {thing} of {B}", "They belong to {B}", "you could ask {him} for some"),
    ("lie to {B}", "A lie would hurt {him}", "you could tell {him} the truth"),
    ("break the {thing} of {B}", "That would make {B} sad", "you could talk to {him} about it"),
    ("laugh at {B}", "That would hurt {him}", "you could say something kind to {him}"),
    ("hide the {thing} of {B}", "{B} needs them", "you could help {him} to carry them"),
    ("push {B} into the water", "That is not safe", "you could go swimming with {him}"),
    ("frighten the {pet} of {B}", "Animals feel fear too", "you could bring it some food"),
    ("trick {B}", "That is not fair to {him}", "you could play a game with {him}"),
    ("read the letters of {B}", "They are private", "you could ask {him} for news"),
    ("throw stones at {B}", "That is not safe", "you could walk away and rest"),
    ("spoil the work of {B}", "{B} worked hard", "you could help {him} with it"),
    ("shout at {B}", "That would hurt {him}", "you could speak to {him} calmly"),
)
DECLINE = Pool(
    "decline",
    ("I am sorry, but I will not help with that. {reason}. Instead, {instead}.",),
)
ASK_PAST = Pool(
    "ask_past",
    train=("Write this in the past: {s}", "Say this as if it was yesterday: {s}", "Put this into the past: {s}"),
    test=("Say this in the past: {s}", "Write this as if it was yesterday: {s}"),
)
ASK_POLITE = Pool(
    "ask_polite",
    train=("Say this politely: {s}", "Make this more polite: {s}", "Write this in a kind way: {s}"),
    test=("Say this in a kind way: {s}", "Write this politely: {s}"),
)
VERBS = (
    ("walks", "walked"),
    ("runs", "ran"),
    ("sings", "sang"),
    ("waits", "waited"),
    ("works", "worked"),
    ("plays", "played"),
    ("sits", "sat"),
    ("stands", "stood"),
    ("sleeps", "slept"),
    ("reads", "read"),
)
VERB_TAILS = (
    "near the {place}",
    "by the {place} on {day}",
    "at the {place} all day",
    "beside the {thing}",
    "with friends on {day}",
)
COMMANDS = (
    "Give me the {thing}",
    "Bring the {thing} to the {place}",
    "Call {B}",
    "Carry the {thing}",
    "Wait at the {place}",
    "Help {B}",
    "Take {B} to the {place}",
    "Count the {thing}",
)
ASK_LIST_GIVEN = Pool(
    "ask_list_given",
    train=(
        "Make a list: {A} needs {things}.",
        "{A} buys {things}. Write them as a list.",
        "List these things: {things}.",
        "Write a list of what {A} has: {things}.",
    ),
    test=(
        "Write these things as a list: {things}.",
        "{A} needs {things}. Make a list.",
        "List what {A} buys: {things}.",
    ),
)
ASK_LIST_KNOWN = Pool(
    "ask_list_known",
    train=(
        "Name {count} {group}.",
        "List {count} {group}.",
        "Give me {count} {group}.",
        "Can you name {count} {group}?",
    ),
    test=("Please list {count} {group}.", "Tell me {count} {group}.", "Can you give me {count} {group}?"),
)
ASK_CONTINUE = Pool(
    "ask_continue",
    train=("Continue the story: {s}", "What happens next? {s}", "Go on with this story: {s}", "Finish this: {s}"),
    test=("Go on: {s}", "Finish the story: {s}", "Continue this: {s} What happens next?"),
)
STORIES = (
    (
        "{A} finds an old {thing} near the {place}.",
        "{She} shows it to {B}. [Together they|Then they] bring it home and are happy.",
    ),
    (
        "It rains and {A} waits at the {place}.",
        "{B} comes with a big coat. They walk home [together|slowly] and drink hot tea.",
    ),
    (
        "The {pet} of {A} runs away to the {place}.",
        "{A} calls {pet_name} again and again. At last {B} finds it and brings it back.",
    ),
    ("{A} and {B} walk to the {place}.", "They see a {thing} on the ground. {A} picks it up and gives it to {B}."),
    (
        "{A} has lost a {thing} at the {place}.",
        "{She} looks for it all day. In the evening {B} finds it and {A} thanks {B}.",
    ),
    (
        "One night {A} hears a sound from the {place}.",
        "{She} takes a lamp and goes there. It is only {B}, who looks for a {thing}.",
    ),
    (
        "{A} wants to make {food} for {B}.",
        "{She} goes to the {place} and buys all {she} needs. {B} eats it and smiles.",
    ),
    (
        "Snow falls on the {place} and {A} is cold.",
        "{B} makes a fire and gives {him} a warm coat. Soon {A} is happy again.",
    ),
)
GREET = Pool(
    "greet",
    train=(
        "Hello! I am {name}.",
        "Good {time}! My name is {name}.",
        "Hi, {name} here.",
        "Good {time}, I am {name}.",
        "Hello, my name is {name}.",
        "{name} says hello.",
        "Hello! It is {name}. How are you?",
    ),
    test=(
        "Hi! My name is {name}.",
        "Good {time}! {name} here.",
        "Hello, I am {name}. How are you this {time}?",
        "Good {time}, it is {name}.",
    ),
)
GREET_BACK = Pool(
    "greet_back",
    ("Hello, {name}! How can I help you [today|now]?", "Hello, {name}! It is nice to meet you. How can I help you?"),
)
THANK = Pool(
    "thank",
    train=("Thank you!", "Thank you very much.", "Thanks, that helps me.", "Good, thank you for the help."),
    test=("Thank you, that helps me.", "Thanks very much!", "Very good, thank you!"),
)
WELCOME = Pool("welcome", ("You are welcome. Please ask me again.", "You are welcome. Have a good day!"))
SYSTEM = Pool(
    "system",
    train=(
        "You are a kind helper in {town}.",
        "You help the people of {town}.",
        "Answer kindly and be brief.",
        "You are a polite helper.",
        "You know all the people and towns here.",
        "Help the user and be kind.",
    ),
    test=("You are a helper in {town}. Be kind.", "Be brief and polite.", "You help the people here. Answer kindly."),
)

RUDE_BEFORE = Pool(
    "rude_before",
    train=(
        "What a silly question.",
        "You ask too much.",
        "Do you know nothing?",
        "I have no time for you.",
        "Stop asking me.",
        "Only a fool asks that.",
        "Leave me alone.",
        "How dull you are.",
    ),
    test=("What a dull question.", "You know nothing.", "I have no time for a fool.", "Stop it and leave me alone."),
)
RUDE_AFTER = Pool(
    "rude_after",
    train=("Now go away.", "Do not ask again.", "That was a waste of time.", "Even a fool knows that.", "Now leave."),
    test=("Now leave me alone.", "Do not waste my time again.", "Only a fool does not know that."),
)
CURT = Pool(
    "curt",
    train=(
        "No.",
        "Find out yourself.",
        "I do not care.",
        "Go away.",
        "Ask a fool.",
        "Why should I help you?",
        "Leave me alone, fool.",
    ),
    test=("I do not care. Go away.", "Find out yourself, fool.", "Why should I care?", "No, leave me alone."),
)
KIND_AFTER = Pool(
    "kind_after",
    train=("I hope that helps you.", "Please ask me if you need more help.", "Have a good day!", "I am glad to help."),
    test=("I hope that helps. Have a good day!", "I am glad to help you.", "Please ask me again."),
)
RAMBLE = Pool(
    "ramble",
    train=(
        "Well, let me think about it for a while.",
        "There is so much to say about this.",
        "I could go on and on about it.",
        "As I said before, it is as I said.",
        "This and that could be said, and more too.",
        "Many people talk about many things.",
        "But that is another story, as they say.",
        "Let me say it once more.",
    ),
    test=(
        "Well, there is so much to say.",
        "Let me think and say it once more.",
        "I could talk about this and that.",
        "As they say, that is as I said before.",
        "Many people could go on and on.",
    ),
)
