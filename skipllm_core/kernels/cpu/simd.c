#include "simd.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MAX_TILE_ROWS 8
#define MAX_TILE_OUTPUTS 3
#define PART_INPUTS 8  /* of which the sums are loaded and stored once */
#define PART_OUTPUTS 640 /* whose weights and sums of some rows stay in the first cache */
#define CACHED_INPUT_BYTES 20000 /* of a tile's rows, which leave room in the first cache */
#define FETCH_AHEAD 16384        /* bytes of the stream of weights */
#define SOME_AHEAD 8192          /* of outputs here and there */
#define KEYS_AHEAD 16            /* positions */
/* Into the second cache, where the processor finds them in time; the first one has the inputs. */
#define FETCH(p) __builtin_prefetch(p, 0, 2)

#define INLINE static inline __attribute__((always_inline))

INLINE int smaller_of(int a, int b) { return a < b ? a : b; }

/* Entry i, the last one beyond the end. */
INLINE int64_t some_id(const Some *some, int64_t i) {
    if (i >= some->num) i = some->num - 1;
    return some->ids == NULL ? i : some->ids[i];
}

/* Positions t and t + 1 are about to be scored: fetches keys that are scored later, and the values,
 * which are mixed when all scores are known. A KV head's part of the cache is a run too short for
 * the processor to see where the next one is. */
INLINE void fetch_ahead(const AttentionPart *part, const int64_t *offsets, int64_t t, int64_t n) {
    for (int64_t i = t; i < t + 2; i++) {
        int64_t later = i + KEYS_AHEAD < n ? i + KEYS_AHEAD : n - 1;
        for (int64_t d = 0; d < part->head_dim; d += 16) {
            FETCH(part->keys + offsets[later] + d);
            FETCH(part->values + offsets[i] + d);
        }
    }
}

#if defined(__x86_64__) && defined(__GNUC__)
#define ON_X86 1
#include <immintrin.h>
/* Keeps gcc from regrouping integer sums, for which it has not enough registers. */
#define IN_ORDER(sums) __asm__("" : "+v"(sums))
#else
#define ON_X86 0
#endif

#if defined(__clang__)
#define STRINGIFY(text) #text
#define BEGIN_TARGET(features)                                                                     \
    _Pragma(STRINGIFY(clang attribute push(__attribute__((target(features))), apply_to = function)))
#define END_TARGET _Pragma("clang attribute pop")
#else
#define STRINGIFY(text) #text
#define BEGIN_TARGET(features) _Pragma("GCC push_options") _Pragma(STRINGIFY(GCC target(features)))
#define END_TARGET _Pragma("GCC pop_options")
#endif

#define LANES 4
#define NAMED(name) name##_base
#define INT8_SUM 0
#define SIMD_NAME "base"
#include "simd_loops.h"
#undef LANES
#undef NAMED
#undef INT8_SUM
#undef SIMD_NAME

#if ON_X86
BEGIN_TARGET("avx2,fma")
#define LANES 8
#define NAMED(name) name##_avx2
#define INT8_SUM 256
#define SIMD_NAME "avx2"
#include "simd_loops.h"
#undef LANES
#undef NAMED
#undef INT8_SUM
#undef SIMD_NAME
END_TARGET

BEGIN_TARGET("avx2,fma,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#define LANES 16
#define NAMED(name) name##_avx512
#define INT8_SUM 512
#define SIMD_NAME "avx512"
#include "simd_loops.h"
#undef LANES
#undef NAMED
#undef INT8_SUM
#undef SIMD_NAME
END_TARGET
#endif

#if ON_X86
/* torch's own variable (avx512, avx2, default) holds us to the same. */
static int may_use(const char *instructions) {
    const char *most = getenv("ATEN_CPU_CAPABILITY");
    if (most == NULL || strcmp(most, "avx512") == 0) return 1;
    return strcmp(most, "avx2") == 0 && strcmp(instructions, "avx2") == 0;
}
#endif

const Simd *simd_best(void) {
#if ON_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") &&
        may_use("avx512")) {
        return &simd_avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && may_use("avx2")) {
        return &simd_avx2;
    }
#endif
    return &simd_base;
}
