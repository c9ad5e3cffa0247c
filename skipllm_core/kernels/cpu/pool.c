/* Between two loops the helpers spin for SPIN_NS and then sleep: a decode step keeps them awake, a
 * server without work does not.
 *
 * Every thread has a share of the items, neighbours, as memory is read fastest in long runs. Whoever
 * is through with his own claims from the others': a helper that the operating system has taken off
 * its core delays the loop by one item, and not by its share of it. That is what OpenMP's static
 * schedule and barriers cannot give beside a busy HTTP process.
 *
 * The state of a share is one word, so that claiming is one compare-and-swap which fails on whatever
 * a late helper believes of a loop that is over:
 *
 *     ticket:  | generation (32) | end of the share (16) | next item (16) |
 */
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

#define SPIN_NS 100000

typedef struct {
    _Alignas(64) _Atomic uint64_t ticket;
} Share;

struct Pool {
    _Alignas(64) _Atomic int64_t num_done;
    _Alignas(64) _Atomic PoolTask task;
    void *_Atomic context;
    _Atomic int num_asleep;
    _Atomic bool is_closing;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    int num_threads, num_helpers; /* num_helpers: those that run */
    pthread_t *helpers;
    Share shares[]; /* [num_threads], of which the first is the caller's */
};

typedef struct {
    Pool *pool;
    int thread;
} Helper;

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static uint32_t generation_of(uint64_t ticket) { return (uint32_t)(ticket >> 32); }
static bool has_items(uint64_t ticket) { return (ticket & 0xffff) < ((ticket >> 16) & 0xffff); }

static void work_on(Pool *pool, Share *share, int thread) {
    uint64_t ticket = atomic_load_explicit(&share->ticket, memory_order_acquire);
    while (has_items(ticket)) {
        /* May be of the next loop already; then the swap fails, as the generation differs. */
        PoolTask task = atomic_load_explicit(&pool->task, memory_order_relaxed);
        void *context = atomic_load_explicit(&pool->context, memory_order_relaxed);
        if (atomic_compare_exchange_weak_explicit(&share->ticket, &ticket, ticket + 1,
                                                  memory_order_acq_rel, memory_order_acquire)) {
            task(context, (int64_t)(ticket & 0xffff), thread);
            atomic_fetch_add_explicit(&pool->num_done, 1, memory_order_release);
            ticket = atomic_load_explicit(&share->ticket, memory_order_acquire);
        }
    }
}

/* Works on the loop until no item of it is left to claim; on the thread's own share first. */
static void work(Pool *pool, int thread) {
    for (int i = 0; i < pool->num_threads; i++) {
        work_on(pool, &pool->shares[(thread + i) % pool->num_threads], thread);
    }
}

static bool must_wait(Pool *pool, Share *share, uint32_t generation) {
    return generation_of(atomic_load(&share->ticket)) == generation &&
           !atomic_load(&pool->is_closing);
}

static void await_next(Pool *pool, Share *share, uint32_t generation) {
    int64_t deadline = now_ns() + SPIN_NS;
    do {
        for (int i = 0; i < 32; i++) {
            if (!must_wait(pool, share, generation)) return;
            relax();
        }
    } while (now_ns() < deadline);
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->num_asleep, 1);
    /* Looked at again after num_asleep is up: pool_run raises the tickets before it reads that. */
    while (must_wait(pool, share, generation)) pthread_cond_wait(&pool->wake, &pool->mutex);
    atomic_fetch_sub(&pool->num_asleep, 1);
    pthread_mutex_unlock(&pool->mutex);
}

static void *help(void *argument) {
    Helper helper = *(Helper *)argument;
    free(argument);
    Pool *pool = helper.pool;
    Share *share = &pool->shares[helper.thread];
    while (!atomic_load(&pool->is_closing)) {
        uint32_t generation = generation_of(atomic_load(&share->ticket));
        work(pool, helper.thread);
        await_next(pool, share, generation);
    }
    return NULL;
}

static void wake_all(Pool *pool) {
    pthread_mutex_lock(&pool->mutex);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
}

Pool *pool_new(int num_threads) {
    size_t size = sizeof(Pool) + (size_t)num_threads * sizeof(Share);
    Pool *pool = aligned_alloc(64, (size + 63) / 64 * 64);
    if (pool == NULL) return NULL;
    for (int i = 0; i < num_threads; i++) atomic_init(&pool->shares[i].ticket, 0);
    atomic_init(&pool->num_done, 0);
    atomic_init(&pool->num_asleep, 0);
    atomic_init(&pool->is_closing, false);
    pool->num_threads = num_threads;
    pool->num_helpers = 0;
    pool->helpers = calloc((size_t)num_threads, sizeof(pthread_t));
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    while (pool->num_helpers < num_threads - 1) {
        Helper *helper = pool->helpers == NULL ? NULL : malloc(sizeof(Helper));
        if (helper != NULL) *helper = (Helper){pool, pool->num_helpers + 1};
        if (helper == NULL || pthread_create(&pool->helpers[pool->num_helpers], NULL, help, helper)) {
            free(helper);
            pool_free(pool);
            return NULL;
        }
        pool->num_helpers++;
    }
    return pool;
}

void pool_free(Pool *pool) {
    atomic_store(&pool->is_closing, true);
    wake_all(pool);
    for (int i = 0; i < pool->num_helpers; i++) pthread_join(pool->helpers[i], NULL);
    pthread_mutex_destroy(&pool->mutex);
    pthread_cond_destroy(&pool->wake);
    free(pool->helpers);
    free(pool);
}

int pool_num_threads(const Pool *pool) { return pool->num_threads; }

void pool_run(Pool *pool, PoolTask task, void *context, int64_t num_items) {
    if (pool->num_helpers == 0 || num_items <= 1) {
        for (int64_t item = 0; item < num_items; item++) task(context, item, 0);
        return;
    }
    atomic_store_explicit(&pool->task, task, memory_order_relaxed);
    atomic_store_explicit(&pool->context, context, memory_order_relaxed);
    atomic_store_explicit(&pool->num_done, 0, memory_order_relaxed);
    uint64_t generation = generation_of(atomic_load(&pool->shares[0].ticket)) + UINT64_C(1);
    int64_t n = pool->num_threads;
    for (int64_t i = n - 1; i >= 0; i--) {
        uint64_t first = (uint64_t)(num_items * i / n), end = (uint64_t)(num_items * (i + 1) / n);
        atomic_store(&pool->shares[i].ticket, generation << 32 | end << 16 | first);
    }
    if (atomic_load(&pool->num_asleep)) wake_all(pool);
    work(pool, 0);
    for (int spins = 0; atomic_load_explicit(&pool->num_done, memory_order_acquire) < num_items;
         spins++) {
        if (spins < 4096) relax();
        else sched_yield(); /* the helper that holds the last item may be waiting for this core */
    }
}
