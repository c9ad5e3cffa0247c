/* A small pool of threads for loops of microseconds: the items of a loop are claimed one by one. */
#ifndef SKIPLLM_POOL_H
#define SKIPLLM_POOL_H

#include <stdint.h>

typedef struct Pool Pool;

/* Runs item `item` of a loop on thread `thread` (0: the caller's). */
typedef void (*PoolTask)(void *context, int64_t item, int thread);

#define POOL_MAX_ITEMS 65535

/* NULL when the threads or the memory cannot be had. One thread is the caller itself. */
Pool *pool_new(int num_threads);
void pool_free(Pool *pool);
int pool_num_threads(const Pool *pool);

/* Calls task for every item in [0, num_items), num_items <= POOL_MAX_ITEMS; returns when all are
 * done. One caller at a time. */
void pool_run(Pool *pool, PoolTask task, void *context, int64_t num_items);

#endif
