/* Included by simd.c once for each instruction set: LANES floats to a vector, NAMED() for the names,
 * INT8_SUM bits for the integer dot product (0: left to the compiler). */

typedef float NAMED(vec) __attribute__((vector_size(LANES * 4)));
typedef float NAMED(loose) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t NAMED(ivec) __attribute__((vector_size(LANES * 4)));
typedef int16_t NAMED(svec) __attribute__((vector_size(LANES * 2)));
#define VEC NAMED(vec)
#define IVEC NAMED(ivec)
#define LOAD(p) (*(const NAMED(loose) *)(p))
#define STORE(p, v) (*(NAMED(loose) *)(p) = (v))

#if LANES == 4
INLINE float NAMED(sum)(VEC v) { return (v[0] + v[2]) + (v[1] + v[3]); }
#elif LANES == 8
INLINE float NAMED(sum)(VEC v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
#else
INLINE float NAMED(sum)(VEC v) { return _mm512_reduce_add_ps(v); }
#endif

static float NAMED(dot)(const float *a, const float *b, int64_t n) {
    VEC sums = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sums += LOAD(a + i) * LOAD(b + i);
    float sum = NAMED(sum)(sums);
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* R rows times O outputs: every weight is loaded once for R rows, every input once for O outputs.
 * Meanwhile P rows of weights from `next` on are fetched: left to itself, the processor fetches too
 * late while several rows are computed. */
INLINE void NAMED(tile_float)(const float *x, int64_t x_stride, const float *w, int64_t n, int R,
                              int O, const float *next, int P, float *out, int64_t out_stride) {
    VEC sums[4][4];
    for (int r = 0; r < R; r++)
        for (int o = 0; o < O; o++) sums[r][o] = (VEC){0};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) { /* a cache line of each row of weights */
        for (int p = 0; p < P; p++) __builtin_prefetch(next + p * n + i);
        for (int64_t k = i; k < i + 16; k += LANES) {
            VEC inputs[4];
            for (int r = 0; r < R; r++) inputs[r] = LOAD(x + r * x_stride + k);
            for (int o = 0; o < O; o++) {
                VEC weights = LOAD(w + o * n + k);
                for (int r = 0; r < R; r++) sums[r][o] += weights * inputs[r];
            }
        }
    }
    for (int r = 0; r < R; r++) {
        for (int o = 0; o < O; o++) {
            float sum = NAMED(sum)(sums[r][o]);
            for (int64_t t = i; t < n; t++) sum += w[o * n + t] * x[r * x_stride + t];
            out[r * out_stride + o] = sum;
        }
    }
}

#if INT8_SUM == 512
typedef __m512i NAMED(sums8);
#define ZERO8 _mm512_setzero_si512()
#define LOAD8(p) _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(p)))
#define LOAD16(p) _mm512_loadu_si512(p)
#define ADD8(sums, w, x) _mm512_dpwssd_epi32(sums, w, x)
#define SUM8(sums) _mm512_reduce_add_epi32(sums)
#elif INT8_SUM == 256
typedef __m256i NAMED(sums8);
#define ZERO8 _mm256_setzero_si256()
#define LOAD8(p) _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(p)))
#define LOAD16(p) _mm256_loadu_si256((const __m256i *)(p))
#define ADD8(sums, w, x) _mm256_add_epi32(sums, _mm256_madd_epi16(w, x))
INLINE int32_t NAMED(sum8)(__m256i v) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    half = _mm_add_epi32(half, _mm_unpackhi_epi64(half, half));
    return _mm_cvtsi128_si32(half) + _mm_extract_epi32(half, 1);
}
#define SUM8(sums) NAMED(sum8)(sums)
#endif

/* Adds a tile's sums of n <= INT8_SUM_MAX products to out[R][O]; rows of weights lie w_stride apart.
 * The sums are taken in integers: exact, in whatever order. */
INLINE void NAMED(tile_int8)(const int16_t *x, int64_t x_stride, const int8_t *w, int64_t w_stride,
                             int64_t n, int R, int O, const int8_t *next, int P, float *out) {
#if INT8_SUM
    enum { STEP = INT8_SUM / 16 };
    NAMED(sums8) sums[4][4];
    for (int r = 0; r < R; r++)
        for (int o = 0; o < O; o++) sums[r][o] = ZERO8;
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        for (int p = 0; p < P; p++) __builtin_prefetch(next + p * w_stride + i);
        for (int64_t k = i; k < i + 64; k += STEP) {
            for (int o = 0; o < O; o++) {
                NAMED(sums8) weights = LOAD8(w + o * w_stride + k);
                for (int r = 0; r < R; r++) {
                    sums[r][o] = ADD8(sums[r][o], weights, LOAD16(x + r * x_stride + k));
                }
            }
        }
    }
    for (int r = 0; r < R; r++) {
        for (int o = 0; o < O; o++) {
            int32_t sum = SUM8(sums[r][o]);
            for (int64_t t = i; t < n; t++) sum += w[o * w_stride + t] * x[r * x_stride + t];
            out[r * O + o] += (float)sum;
        }
    }
#else
    (void)next, (void)P;
    for (int r = 0; r < R; r++) {
        for (int o = 0; o < O; o++) {
            int32_t sum = 0;
            for (int64_t t = 0; t < n; t++) sum += w[o * w_stride + t] * x[r * x_stride + t];
            out[r * O + o] += (float)sum;
        }
    }
#endif
}

/* R rows times O outputs from `output` on, with scales and biases; fetches P rows of weights from
 * output number `next` on. */
INLINE void NAMED(tile)(const Linear *linear, const Input *input, int row, int R, int64_t output,
                        int O, int64_t next, int P, float *out, int64_t out_stride) {
    int64_t n = linear->num_inputs;
    float *to = out + row * out_stride;
    if (linear->scale == NULL) {
        const float *weight = linear->weight;
        NAMED(tile_float)(input->values + row * input->row_stride, input->row_stride,
                          weight + output * n, n, R, O, weight + next * n, P, to, out_stride);
    } else {
        const int8_t *weight = linear->weight;
        const int16_t *x = input->quantized + row * input->row_stride;
        float sums[16] = {0};
        for (int64_t i = 0; i < n; i += INT8_SUM_MAX) {
            NAMED(tile_int8)(x + i, input->row_stride, weight + output * n + i, n,
                             n - i < INT8_SUM_MAX ? n - i : INT8_SUM_MAX, R, O,
                             weight + next * n + i, P, sums);
        }
        for (int r = 0; r < R; r++)
            for (int o = 0; o < O; o++)
                to[r * out_stride + o] =
                    sums[r * O + o] * (linear->scale[output + o] * input->scales[row + r]);
    }
    if (linear->bias != NULL)
        for (int r = 0; r < R; r++)
            for (int o = 0; o < O; o++) to[r * out_stride + o] += linear->bias[output + o];
}

/* Every row for four outputs; fetches four rows of weights from output number `next` on, evenly
 * over its tiles. Four rows by two outputs fill the registers of AVX2. */
INLINE void NAMED(four_outputs)(const Linear *linear, const Input *input, int64_t output,
                                int64_t next, float *out, int64_t out_stride) {
    int num_rows = input->num_rows, row = 0;
    if (num_rows == 4) {
        NAMED(tile)(linear, input, 0, 4, output, 2, next, 2, out, out_stride);
        NAMED(tile)(linear, input, 0, 4, output + 2, 2, next + 2, 2, out + 2, out_stride);
        return;
    }
    for (; row + 4 <= num_rows && row < 8; row += 4, next += 2) {
        NAMED(tile)(linear, input, row, 4, output, 2, next, 1, out, out_stride);
        NAMED(tile)(linear, input, row, 4, output + 2, 2, next + 1, 1, out + 2, out_stride);
    }
    for (; row + 4 <= num_rows; row += 4) {
        NAMED(tile)(linear, input, row, 4, output, 2, 0, 0, out, out_stride);
        NAMED(tile)(linear, input, row, 4, output + 2, 2, 0, 0, out + 2, out_stride);
    }
    switch (num_rows - row) {
    case 3:
        NAMED(tile)(linear, input, row, 3, output, 2, next, 2, out, out_stride);
        NAMED(tile)(linear, input, row, 3, output + 2, 2, next + 2, 2, out + 2, out_stride);
        break;
    case 2: NAMED(tile)(linear, input, row, 2, output, 4, next, 4, out, out_stride); break;
    case 1: NAMED(tile)(linear, input, row, 1, output, 4, next, 4, out, out_stride); break;
    }
}

static void NAMED(linear)(const Linear *linear, const Input *input, int64_t first, int64_t end,
                          float *out, int64_t out_stride) {
    int64_t bytes = linear->num_inputs * (linear->scale == NULL ? (int64_t)sizeof(float) : 1);
    int64_t ahead = 4 * (PREFETCH_BYTES / (4 * bytes) + 1); /* outputs; may point beyond the end */
    int64_t output = first;
    for (; output + 4 <= end; output += 4)
        NAMED(four_outputs)(linear, input, output, output + ahead, out + (output - first), out_stride);
    for (; output < end; output++)
        for (int row = 0; row < input->num_rows; row++)
            NAMED(tile)(linear, input, row, 1, output, 1, 0, 0, out + (output - first), out_stride);
}

/* e^x to 2 units in the last place, for x <= 88 (Cephes' polynomial); below -87: almost 0. */
INLINE VEC NAMED(exp)(VEC x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    VEC low = (VEC){0} - 87.0f;
    IVEC is_low = x < low;
    x = (VEC)(((IVEC)x & ~is_low) | ((IVEC)low & is_low));
    VEC turns = x * 1.44269504088896341f + magic;
    IVEC exponent = (IVEC)turns << 23; /* the integer stands in the lowest bits */
    turns -= magic;
    VEC r = x - turns * 0.693359375f;
    r -= turns * -2.12194440e-4f;
    VEC y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    return (VEC)((IVEC)y + exponent);
}

INLINE VEC NAMED(swiglu)(VEC gate, VEC up) {
    VEC high = (VEC){0} + 88.0f;
    VEC minus = -gate;
    IVEC is_high = minus > high;
    minus = (VEC)(((IVEC)minus & ~is_high) | ((IVEC)high & is_high));
    return gate / (1.0f + NAMED(exp)(minus)) * up;
}

static void NAMED(silu_mul)(float *gate, const float *up, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) STORE(gate + i, NAMED(swiglu)(LOAD(gate + i), LOAD(up + i)));
    if (i < n) {
        float gates[LANES] = {0}, ups[LANES] = {0};
        memcpy(gates, gate + i, (size_t)(n - i) * sizeof(float));
        memcpy(ups, up + i, (size_t)(n - i) * sizeof(float));
        STORE(gates, NAMED(swiglu)(LOAD(gates), LOAD(ups)));
        memcpy(gate + i, gates, (size_t)(n - i) * sizeof(float));
    }
}

/* Scores of Q queries: weights[q][t] = scale * query q . key t. */
INLINE void NAMED(scores)(const AttentionPart *part, const int64_t *offsets, int64_t n, int first,
                          int Q, float scale) {
    int64_t head_dim = part->head_dim, stride = part->weight_stride;
    const float *queries = part->queries + first * head_dim;
    float *weights = part->weights + first * stride;
    for (int64_t t = 0; t < n; t++) {
        float scores[4];
        NAMED(tile_float)(queries, head_dim, part->keys + offsets[t], head_dim, Q, 1, NULL, 0,
                          scores, 1);
        for (int q = 0; q < Q; q++) weights[q * stride + t] = scale * scores[q];
    }
}

/* out[q][d] for LANES values of d on, or for one: the weighted sum of the values. */
INLINE void NAMED(mix)(const AttentionPart *part, const int64_t *offsets, int64_t n, int first,
                       int Q, int64_t d) {
    int64_t stride = part->weight_stride;
    const float *weights = part->weights + first * stride;
    VEC sums[4];
    for (int q = 0; q < Q; q++) sums[q] = (VEC){0};
    for (int64_t t = 0; t < n; t++) {
        VEC value = LOAD(part->values + offsets[t] + d);
        for (int q = 0; q < Q; q++) sums[q] += weights[q * stride + t] * value;
    }
    for (int q = 0; q < Q; q++) STORE(part->out + (first + q) * part->head_dim + d, sums[q]);
}

/* e^(weight - max) of one query; its maximum and sum are kept to merge chunks. */
INLINE void NAMED(exponentials)(const AttentionPart *part, int64_t n, int q) {
    float *weights = part->weights + q * part->weight_stride;
    float max = weights[0];
    for (int64_t t = 1; t < n; t++) max = weights[t] > max ? weights[t] : max;
    int64_t end = (n + LANES - 1) / LANES * LANES; /* weight_stride has room for it */
    for (int64_t t = n; t < end; t++) weights[t] = -INFINITY;
    for (int64_t t = 0; t < end; t += LANES) STORE(weights + t, NAMED(exp)(LOAD(weights + t) - max));
    for (int64_t t = n; t < end; t++) weights[t] = 0;
    VEC sums = {0};
    for (int64_t t = 0; t < end; t += LANES) sums += LOAD(weights + t);
    part->maxima[q] = max;
    part->sums[q] = NAMED(sum)(sums);
}

INLINE void NAMED(attend_queries)(const AttentionPart *part, const int64_t *offsets, int64_t n,
                                  int first, int Q) {
    int64_t head_dim = part->head_dim, d = 0;
    NAMED(scores)(part, offsets, n, first, Q, 1.0f / sqrtf((float)head_dim));
    for (int q = first; q < first + Q; q++) NAMED(exponentials)(part, n, q);
    for (; d + LANES <= head_dim; d += LANES) NAMED(mix)(part, offsets, n, first, Q, d);
    for (; d < head_dim; d++) {
        for (int q = first; q < first + Q; q++) {
            float sum = 0;
            for (int64_t t = 0; t < n; t++)
                sum += part->weights[q * part->weight_stride + t] * part->values[offsets[t] + d];
            part->out[q * head_dim + d] = sum;
        }
    }
}

static void NAMED(attend)(const AttentionPart *part) {
    int64_t offsets[MAX_POSITIONS], n = 0;
    for (int64_t position = part->first; position < part->end;) {
        int64_t block = position / part->block_size, in_block = position % part->block_size;
        int64_t slot = (int64_t)part->block_table[block] * part->block_size + in_block;
        for (; in_block < part->block_size && position < part->end; in_block++, position++, slot++)
            offsets[n++] = slot * part->kv_stride + part->kv_offset;
    }
    int q = 0;
    for (; q + 4 <= part->num_queries; q += 4) NAMED(attend_queries)(part, offsets, n, q, 4);
    switch (part->num_queries - q) {
    case 3: NAMED(attend_queries)(part, offsets, n, q, 3); break;
    case 2: NAMED(attend_queries)(part, offsets, n, q, 2); break;
    case 1: NAMED(attend_queries)(part, offsets, n, q, 1); break;
    }
}

static float NAMED(quantize)(const float *x, int64_t n, int16_t *quantized) {
    /* Without the sign, floats are ordered as the integers of the same bits, NaN above infinity. */
    IVEC maxima = {0};
    int32_t bits[LANES], max = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        IVEC magnitude = (IVEC)LOAD(x + i) & 0x7fffffff;
        IVEC is_more = magnitude > maxima;
        maxima = (magnitude & is_more) | (maxima & ~is_more);
    }
    memcpy(bits, &maxima, sizeof(bits));
    for (int lane = 0; lane < LANES; lane++) max = bits[lane] > max ? bits[lane] : max;
    for (int64_t t = i; t < n; t++) {
        memcpy(bits, x + t, sizeof(bits[0]));
        max = (bits[0] & 0x7fffffff) > max ? bits[0] & 0x7fffffff : max;
    }
    float most;
    memcpy(&most, &max, sizeof(most));
    if (!isfinite(most)) {
        memset(quantized, 0, (size_t)n * sizeof(int16_t));
        return NAN;
    }
    float inverse = QUANTIZED_MAX / most;
    if (!isfinite(inverse)) inverse = 0; /* all are 0, or next to it */
    const float magic = 12582912.0f; /* see exp */
    for (i = 0; i + LANES <= n; i += LANES) {
        IVEC rounded = (IVEC)(LOAD(x + i) * inverse + magic) - 0x4b400000; /* magic's own bits */
        NAMED(svec) narrow = __builtin_convertvector(rounded, NAMED(svec));
        memcpy(quantized + i, &narrow, sizeof(narrow));
    }
    for (; i < n; i++) quantized[i] = (int16_t)lrintf(x[i] * inverse);
    return most / QUANTIZED_MAX;
}

static const Simd NAMED(simd) = {
    .name = SIMD_NAME,
    .linear = NAMED(linear),
    .attend = NAMED(attend),
    .silu_mul = NAMED(silu_mul),
    .dot = NAMED(dot),
    .quantize = NAMED(quantize),
};

#undef VEC
#undef IVEC
#undef LOAD
#undef STORE
#undef ZERO8
#undef LOAD8
#undef LOAD16
#undef ADD8
#undef SUM8
