/* Work on several cores, by the threads that PyTorch's own operations use.

   A second pool of threads would fight the first one for the cores, so `GOMP_parallel` of the library that PyTorch has loaded
   is handed in. Items are taken in order by whichever thread is free; an item's result does not depend on who computes it. */
#pragma once

typedef void (*item_function)(const void *job, long item);

void run_items(item_function function, const void *job, long items, long threads);

/* How many rows an item takes: as few as pay for a call. */
#define CHUNK 32
