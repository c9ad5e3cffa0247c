#include "simd.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define PREFETCH_BYTES 4096

#define INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GNUC__)
#define ON_X86 1
#include <immintrin.h>
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
