#include "parallel.h"

typedef void (*parallel_function)(void (*)(void *), void *, unsigned, unsigned);

static parallel_function start_team;

void burnish_use(void *gomp_parallel) { start_team = (parallel_function)gomp_parallel; }

typedef struct {
  item_function function;
  const void *job;
  long items, next;
} Team;

static void take_items(void *given) {
  Team *team = given;
  for (;;) {
    long item = __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED);
    if (item >= team->items) return;
    team->function(team->job, item);
  }
}

void run_items(item_function function, const void *job, long items, long threads) {
  Team team = {function, job, items, 0};
  if (threads > items) threads = items;
  if (threads > 1 && start_team)
    start_team(take_items, &team, (unsigned)threads, 0);
  else
    take_items(&team);
}
