/* The buffers of one owner. */
#ifndef SKIPLLM_MEMORY_H
#define SKIPLLM_MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MAX_BUFFERS 16

typedef struct {
    void *buffers[MAX_BUFFERS];
    int num;
    bool is_short; /* some buffer could not be had */
} Memory;

/* `num` elements of `bytes` each, all 0, at the beginning of a cache line; NULL where there is not
 * enough memory. Pages that are never written take none. */
void *memory_zeros(Memory *memory, int64_t num, size_t bytes);
void memory_free(Memory *memory);

#endif
