"""The length rules (T-14, T-15, S1-14, S4-07, D-13)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.data.lengths import Draft, Limits, Tokens, excess_of, fit_lengths

END = frozenset({0})


def draft(prompt: int, *answers: int, **more: bool) -> Draft:
    """A draft of these lengths: prompt ids from 100, answers from 1000 (and 2000), each ending in 0."""
    completions = [Tokens([1000 * k + i for i in range(n - 1)] + [0], [True] * n) for k, n in enumerate(answers, 1)]
    return Draft(list(range(100, 100 + prompt)), completions, **more)


def test_what_fits_is_untouched() -> None:
    given_draft = draft(3, 4, 5)
    fit = fit_lengths(given_draft, Limits(8, 3, 5), END)
    assert fit.draft is given_draft and not fit.cut and not fit.reason


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(8), "prompt and answer have 9 tokens, max_length is 8"),
        (Limits(4), "the prompt alone has 4 tokens, max_length is 4"),
        (Limits(None, prompt=3), "the prompt has 4 tokens, max_prompt_length is 3"),
        (Limits(None, completion=4), "the answer has 5 tokens, max_completion_length is 4"),
    ],
)
def test_d13_s1_14_skip_says_what_is_too_long(limits: Limits, words: str) -> None:
    fit = fit_lengths(draft(4, 3, 5), limits, END)
    assert fit.draft is None and fit.reason == words


def test_keep_start_cuts_the_answers_end_and_keeps_eos() -> None:
    fit = fit_lengths(draft(4, 3, 6), Limits(8, truncation="keep_start"), END)
    assert fit.draft is not None and fit.cut and fit.lost_eos == 0
    assert fit.draft.prompt == [100, 101, 102, 103]
    assert [c.ids for c in fit.draft.completions] == [[1000, 1001, 0], [2000, 2001, 2002, 0]]


def test_keep_end_cuts_the_prompts_start_and_keeps_bos() -> None:
    fit = fit_lengths(draft(6, 3, 4, has_bos=True), Limits(8, truncation="keep_end"), END)
    assert fit.draft is not None
    assert fit.draft.prompt == [100, 103, 104, 105]
    assert [len(c.ids) for c in fit.draft.completions] == [3, 4]


def test_prompt_and_completion_limits_cut_both() -> None:
    fit = fit_lengths(draft(6, 6), Limits(None, 2, 3, "keep_start"), END)
    assert fit.draft is not None
    assert fit.draft.prompt == [104, 105] and fit.draft.completions[0].ids == [1000, 1001, 0]


def test_d13_a_prompt_that_leaves_no_room_is_left_out_not_cut() -> None:
    fit = fit_lengths(draft(9, 3), Limits(8, truncation="keep_start"), END)
    assert fit.draft is None and "nothing of the answer would be left" in fit.reason


def test_conversations_keep_their_last_tokens() -> None:
    made = Draft([1, 2], [Tokens([3, 4, 5, 6, 0], [True, True, False, False, True])], sequence=True)
    fit = fit_lengths(made, Limits(4, truncation="keep_end"), END)
    assert fit.draft is not None
    assert fit.draft.prompt == [4, 5, 6] and fit.draft.completions[0].ids == [0]
    fit = fit_lengths(made, Limits(5, truncation="keep_start"), END)
    assert fit.draft is not None and fit.draft.completions[0].ids == [3, 0], "unscored ends go too"


def test_t14_an_answer_without_end_token_gets_none() -> None:
    fit = fit_lengths(Draft([1], [Tokens([5, 6, 7], [True] * 3)]), Limits(3, truncation="keep_start"), END)
    assert fit.draft is not None and fit.draft.completions[0].ids == [5, 6] and fit.lost_eos == 0


sizes = st.integers(1, 12)


@given(
    sizes,
    st.lists(sizes, min_size=1, max_size=2),
    st.none() | st.integers(2, 20),
    st.none() | st.integers(1, 10),
    st.none() | st.integers(1, 10),
    st.sampled_from(["skip", "keep_start", "keep_end"]),
    st.booleans(),
    st.booleans(),
)
def test_laws_of_cutting(prompt, answers, total, prompt_limit, completion_limit, mode, sequence, bos) -> None:
    made = draft(prompt, *answers, sequence=sequence and len(answers) == 1, has_bos=bos)
    limits = Limits(total, prompt_limit, completion_limit, mode)
    fit = fit_lengths(made, limits, END)
    assert bool(fit.reason) == bool(excess_of(made, limits))
    if fit.draft is None:
        assert fit.reason
        return
    assert fit.draft.prompt and len(fit.draft.completions) == len(answers)
    longest = max(len(c.ids) for c in fit.draft.completions)
    if total is not None:
        assert len(fit.draft.prompt) + longest <= total
    if not (made.sequence and mode == "keep_end"):
        assert prompt_limit is None or len(fit.draft.prompt) <= prompt_limit
        assert completion_limit is None or longest <= completion_limit
    for completion in fit.draft.completions:
        assert len(completion.ids) == len(completion.mask) and any(completion.mask)
        assert completion.ids[-1] == 0, "EOS is never lost"
    assert fit.lost_eos == 0
