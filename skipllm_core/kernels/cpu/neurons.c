#include "neurons.h"

#include <string.h>

/* The k-th smallest of n keys, which are put in another order, counted from 0: digit by digit. */
static uint32_t kth_smallest(uint32_t *keys, int64_t n, int64_t k) {
    for (int shift = 24;; shift -= 8) {
        int64_t counts[256] = {0}, digit = 0, num_kept = 0;
        for (int64_t i = 0; i < n; i++) counts[keys[i] >> shift & 255]++;
        while (k >= counts[digit]) k -= counts[digit++];
        for (int64_t i = 0; i < n; i++) {
            uint32_t key = keys[i];
            keys[num_kept] = key;
            num_kept += (key >> shift & 255) == digit;
        }
        n = num_kept;
        if (shift == 0) return keys[0];
    }
}

int64_t choose_together(const float *sums, int32_t *gone, int64_t n, int64_t total, int num_rows,
                        uint32_t *keys) {
    const uint32_t infinity = 0x7f800000;
    int64_t count = num_rows == 0 ? 0 : total / num_rows, num_left = 0, num_gone = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t key;
        memcpy(&key, sums + i, sizeof(key));
        /* Without their sign, floats are ordered as their bits, and what is no number comes last. */
        keys[num_left] = key & 0x7fffffff;
        num_left += !gone[i];
    }
    uint32_t limit = infinity + 1;
    if (count < num_left) limit = kth_smallest(keys, num_left, count);
    if (limit > infinity + 1) limit = 0; /* no number: nothing is below it */
    for (int64_t i = 0; i < n; i++) {
        uint32_t key;
        memcpy(&key, sums + i, sizeof(key));
        if (gone[i] || (key & 0x7fffffff) >= limit) continue;
        gone[i] = -1;
        num_gone++;
    }
    return num_gone;
}
