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
 * Meanwhile as many weights from `ahead` bytes on are fetched, where that is not 0. */
INLINE void NAMED(tile_float)(const float *x, int64_t x_stride, const float *w, int64_t n, int R,
                              int O, int64_t ahead, float *out, int64_t out_stride) {
    VEC sums[MAX_TILE_ROWS][MAX_TILE_OUTPUTS];
    for (int r = 0; r < R; r++)
        for (int o = 0; o < O; o++) sums[r][o] = (VEC){0};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) { /* a cache line of each row of weights */
        if (ahead)
            for (int o = 0; o < O; o++) FETCH((const char *)(w + O * i + 16 * o) + ahead);
        for (int k = 0; k < 16; k += LANES) {
            VEC weights[MAX_TILE_OUTPUTS];
            for (int o = 0; o < O; o++) weights[o] = LOAD(w + o * n + i + k);
            for (int r = 0; r < R; r++) {
                VEC input = LOAD(x + r * x_stride + i + k);
                for (int o = 0; o < O; o++) sums[r][o] += weights[o] * input;
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
#define SPREAD16(x) _mm512_set1_epi32(x)
#define STORE16(p, sums) _mm512_storeu_si512(p, sums)
#define HALF8(sums) _mm256_add_epi32(_mm512_castsi512_si256(sums), _mm512_extracti64x4_epi64(sums, 1))
#elif INT8_SUM == 256
typedef __m256i NAMED(sums8);
#define ZERO8 _mm256_setzero_si256()
#define LOAD8(p) _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(p)))
#define LOAD16(p) _mm256_loadu_si256((const __m256i *)(p))
#define ADD8(sums, w, x) _mm256_add_epi32(sums, _mm256_madd_epi16(w, x))
#define SPREAD16(x) _mm256_set1_epi32(x)
#define STORE16(p, sums) _mm256_storeu_si256((__m256i *)(p), sums)
#define HALF8(sums) (sums)
#endif

#if INT8_SUM
/* The sums of four vectors of integers. */
INLINE void NAMED(sum8_four)(const NAMED(sums8) *v, int32_t *out) {
    __m256i pairs = _mm256_hadd_epi32(HALF8(v[0]), HALF8(v[1]));
    pairs = _mm256_hadd_epi32(pairs, _mm256_hadd_epi32(HALF8(v[2]), HALF8(v[3])));
    __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    _mm_storeu_si128((__m128i *)out, sums);
}
#endif

/* A tile's sums of n <= INT8_SUM_MAX products, out[R * O and up to 3 more]; rows of weights lie
 * w_stride apart. The sums are taken in integers: exact, in whatever order. */
INLINE void NAMED(tile_int8)(const int16_t *x, int64_t x_stride, const int8_t *w, int64_t w_stride,
                             int64_t n, int R, int O, int64_t ahead, int32_t *out) {
    int64_t i = 0;
#if INT8_SUM
    enum { STEP = INT8_SUM / 16 };
    NAMED(sums8) sums[MAX_TILE_ROWS * MAX_TILE_OUTPUTS];
    for (int j = 0; j < (R * O + 3) / 4 * 4; j++) sums[j] = ZERO8;
    for (; i + 64 <= n; i += 64) {
        if (ahead)
            for (int o = 0; o < O; o++) FETCH(w + O * i + 64 * o + ahead);
        for (int k = 0; k < 64; k += STEP) {
            NAMED(sums8) weights[MAX_TILE_OUTPUTS];
            for (int o = 0; o < O; o++) weights[o] = LOAD8(w + o * w_stride + i + k);
            for (int r = 0; r < R; r++) {
                NAMED(sums8) input = LOAD16(x + r * x_stride + i + k);
                for (int o = 0; o < O; o++) {
                    sums[r * O + o] = ADD8(sums[r * O + o], weights[o], input);
                    IN_ORDER(sums[r * O + o]);
                }
            }
        }
    }
    for (int j = 0; j < R * O; j += 4) NAMED(sum8_four)(sums + j, out + j);
#else
    (void)ahead;
    for (int j = 0; j < R * O; j++) out[j] = 0;
#endif
    for (int r = 0; r < R; r++)
        for (int o = 0; o < O; o++)
            for (int64_t t = i; t < n; t++) out[r * O + o] += w[o * w_stride + t] * x[r * x_stride + t];
}

/* R rows times O outputs from `output` on, with scales and biases. */
INLINE void NAMED(tile)(const Linear *linear, const Input *input, int row, int R, int64_t output,
                        int O, int64_t ahead, float *out, int64_t out_stride) {
    int64_t n = linear->num_inputs;
    float *to = out + row * out_stride;
    if (linear->scale == NULL) {
        const float *weight = linear->weight;
        NAMED(tile_float)(input->values + row * input->row_stride, input->row_stride,
                          weight + output * n, n, R, O, ahead, to, out_stride);
    } else {
        const int8_t *weight = linear->weight;
        const int16_t *x = input->quantized + row * input->row_stride;
        int32_t parts[MAX_TILE_ROWS * MAX_TILE_OUTPUTS];
        float sums[MAX_TILE_ROWS * MAX_TILE_OUTPUTS];
        for (int64_t i = 0; i == 0 || i < n; i += INT8_SUM_MAX) {
            NAMED(tile_int8)(x + i, input->row_stride, weight + output * n + i, n,
                             n - i < INT8_SUM_MAX ? n - i : INT8_SUM_MAX, R, O, ahead, parts);
            for (int j = 0; j < R * O; j++) sums[j] = i == 0 ? (float)parts[j] : sums[j] + (float)parts[j];
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

/* Up to eight rows for one output: a single stream of weights, which the processor fetches best. */
INLINE void NAMED(one_output)(const Linear *linear, const Input *input, int row, int num_rows,
                              int64_t output, int64_t ahead, float *out, int64_t out_stride) {
    switch (num_rows) {
    case 8: NAMED(tile)(linear, input, row, 8, output, 1, ahead, out, out_stride); break;
    case 7: NAMED(tile)(linear, input, row, 7, output, 1, ahead, out, out_stride); break;
    case 6: NAMED(tile)(linear, input, row, 6, output, 1, ahead, out, out_stride); break;
    case 5: NAMED(tile)(linear, input, row, 5, output, 1, ahead, out, out_stride); break;
    case 4: NAMED(tile)(linear, input, row, 4, output, 1, ahead, out, out_stride); break;
    case 3: NAMED(tile)(linear, input, row, 3, output, 1, ahead, out, out_stride); break;
    case 2: NAMED(tile)(linear, input, row, 2, output, 1, ahead, out, out_stride); break;
    case 1: NAMED(tile)(linear, input, row, 1, output, 1, ahead, out, out_stride); break;
    }
}

/* Up to four rows for three outputs, which fill the registers of AVX2: inputs that do not stay in
 * the first cache are loaded a third as often. */
INLINE void NAMED(three_outputs)(const Linear *linear, const Input *input, int row, int num_rows,
                                 int64_t output, int64_t ahead, float *out, int64_t out_stride) {
    switch (num_rows) {
    case 4: NAMED(tile)(linear, input, row, 4, output, 3, ahead, out, out_stride); break;
    case 3: NAMED(tile)(linear, input, row, 3, output, 3, ahead, out, out_stride); break;
    case 2: NAMED(tile)(linear, input, row, 2, output, 3, ahead, out, out_stride); break;
    case 1: NAMED(tile)(linear, input, row, 1, output, 3, ahead, out, out_stride); break;
    }
}

/* The rows in groups, whose inputs stay in the first cache; the first group brings the weights of
 * [first, end) into the second one for the others. */
static void NAMED(linear)(const Linear *linear, const Input *input, int64_t first, int64_t end,
                          float *out, int64_t out_stride) {
    int64_t element = linear->scale == NULL ? sizeof(float) : sizeof(int16_t);
    int64_t row_bytes = linear->num_inputs * element;
    int is_wide = smaller_of(input->num_rows, MAX_TILE_ROWS) * row_bytes > CACHED_INPUT_BYTES;
    int group = is_wide ? 4 : MAX_TILE_ROWS;
    for (int row = 0; row < input->num_rows; row += group) {
        int num_rows = smaller_of(input->num_rows - row, group);
        /* A single row's stream is fetched best by the processor alone. */
        int64_t ahead = row == 0 && num_rows > 1 ? FETCH_AHEAD : 0, output = first;
        for (; is_wide && output + 3 <= end; output += 3)
            NAMED(three_outputs)(linear, input, row, num_rows, output, ahead,
                                 out + (output - first), out_stride);
        for (; output < end; output++)
            NAMED(one_output)(linear, input, row, num_rows, output, ahead, out + (output - first),
                              out_stride);
    }
}

/* Outputs here and there: what comes next is fetched, as the processor cannot know it. */
static void NAMED(linear_some)(const Linear *linear, const Input *input, const Some *some, int64_t first,
                               int64_t end, float *out, int64_t out_stride) {
    int64_t row_bytes = linear->num_inputs * (linear->scale == NULL ? 4 : 1);
    int64_t rows_ahead = SOME_AHEAD / row_bytes > 3 ? SOME_AHEAD / row_bytes : 3;
    for (int row = 0; row < input->num_rows; row += MAX_TILE_ROWS) {
        int num_rows = smaller_of(input->num_rows - row, MAX_TILE_ROWS);
        for (int64_t i = first; i < end; i++) {
            int64_t later = i + rows_ahead < some->num ? i + rows_ahead : some->num - 1;
            int64_t ahead = row == 0 ? (some->ids[later] - some->ids[i]) * row_bytes : 0;
            NAMED(one_output)(linear, input, row, num_rows, some->offset + some->ids[i], ahead,
                              out + (i - first), out_stride);
        }
    }
}

/* |x| * norm below the threshold: x becomes 0, which is counted; of the others `wanted` is set. */
static int64_t NAMED(leave_out)(float *x, const float *norms, float threshold, int32_t *wanted,
                                int64_t n) {
    IVEC counts = {0};
    int64_t i = 0, count = 0;
    for (; i + LANES <= n; i += LANES) {
        VEC value = LOAD(x + i);
        VEC score = (VEC)((IVEC)value & 0x7fffffff) * LOAD(norms + i);
        IVEC is_below = score < threshold;
        STORE(x + i, (VEC)((IVEC)value & ~is_below));
        STORE(wanted + i, (VEC)((IVEC)LOAD(wanted + i) | ~is_below));
        counts -= is_below;
    }
    for (int lane = 0; lane < LANES; lane++) count += counts[lane];
    for (; i < n; i++) {
        int is_below = fabsf(x[i]) * norms[i] < threshold;
        if (is_below) x[i] = 0;
        wanted[i] |= -!is_below;
        count += is_below;
    }
    return count;
}

/* sums[n] += x[0] * w[0] + .. + x[K - 1] * w[K - 1], one after the other. Fetches `next`, which are
 * rows of weights too, where it is not NULL. */
INLINE void NAMED(add_inputs)(float *sums, const float *x, const float *const *w, int K, int64_t n,
                              const float *const *next) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        if (next != NULL)
            for (int k = 0; k < PART_INPUTS; k++) FETCH(next[k] + i);
        for (int64_t t = i; t < i + 16; t += LANES) {
            VEC sum = LOAD(sums + t);
            for (int k = 0; k < K; k++) sum += x[k] * LOAD(w[k] + t);
            STORE(sums + t, sum);
        }
    }
    for (; i < n; i++)
        for (int k = 0; k < K; k++) sums[i] += x[k] * w[k][i];
}

/* The inputs of one row that are not 0, up to PART_INPUTS. */
INLINE void NAMED(add_block)(float *sums, const float *x, const float *const *w, int num_inputs,
                             int64_t n, const float *const *next) {
    float used_x[PART_INPUTS];
    const float *used[PART_INPUTS];
    int num_used = 0;
    for (int k = 0; k < num_inputs; k++) {
        used_x[num_used] = x[k];
        used[num_used] = w[k];
        num_used += x[k] != 0;
    }
    switch (num_used) {
    case 8: NAMED(add_inputs)(sums, used_x, used, 8, n, next); break;
    case 7: NAMED(add_inputs)(sums, used_x, used, 7, n, next); break;
    case 6: NAMED(add_inputs)(sums, used_x, used, 6, n, next); break;
    case 5: NAMED(add_inputs)(sums, used_x, used, 5, n, next); break;
    case 4: NAMED(add_inputs)(sums, used_x, used, 4, n, next); break;
    case 3: NAMED(add_inputs)(sums, used_x, used, 3, n, next); break;
    case 2: NAMED(add_inputs)(sums, used_x, used, 2, n, next); break;
    case 1: NAMED(add_inputs)(sums, used_x, used, 1, n, next); break;
    }
}

static void NAMED(part_float)(const Linear *linear, const Input *input, const Some *some, int row,
                              int num_rows, int64_t first, int64_t end, int64_t output,
                              int64_t num_outputs, float *out) {
    int64_t n = linear->num_outputs;
    const float *weight = (const float *)linear->weight + output;
    for (int64_t i = first; i < end; i += PART_INPUTS) {
        int num_inputs = end - i < PART_INPUTS ? (int)(end - i) : PART_INPUTS;
        const float *w[PART_INPUTS], *next[PART_INPUTS];
        int64_t ids[PART_INPUTS];
        for (int k = 0; k < PART_INPUTS; k++) {
            ids[k] = some_id(some, i + k);
            w[k] = weight + ids[k] * n;
            next[k] = weight + some_id(some, i + PART_INPUTS + k) * n;
        }
        for (int r = row; r < row + num_rows; r++) {
            float x[PART_INPUTS];
            for (int k = 0; k < num_inputs; k++) x[k] = input->values[r * input->row_stride + ids[k]];
            if (r == 0) NAMED(add_block)(out + r * n + output, x, w, num_inputs, num_outputs, next);
            else NAMED(add_block)(out + r * n + output, x, w, num_inputs, num_outputs, NULL);
        }
    }
}

/* Rows a and b of weights, value by value beside each other. */
INLINE void NAMED(pair_up)(const int8_t *a, const int8_t *b, int64_t n, const int8_t *next_a,
                           const int8_t *next_b, int16_t *pairs) {
    int64_t i = 0;
#if INT8_SUM
    for (; i + 16 <= n; i += 16) {
        if (i % 64 == 0) {
            FETCH(next_a + i);
            FETCH(next_b + i);
        }
#if INT8_SUM == 512
        __m512i low = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(a + i)));
        __m512i high = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(b + i)));
        _mm512_storeu_si512(pairs + 2 * i, _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_slli_epi32(high, 16)));
#else
        for (int64_t t = i; t < i + 16; t += 8) {
            __m256i low = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(a + t)));
            __m256i high = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(b + t)));
            _mm256_storeu_si256((__m256i *)(pairs + 2 * t),
                                _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xaa));
        }
#endif
    }
#else
    (void)next_a;
    (void)next_b;
#endif
    for (; i < n; i++) {
        pairs[2 * i] = a[i];
        pairs[2 * i + 1] = b[i];
    }
}

/* sums[n] += the products of K pairs of inputs with their pairs of weights. */
INLINE void NAMED(add_pairs)(int32_t *sums, const int16_t *const *x, const int16_t *const *pairs,
                             int K, int64_t n) {
    int64_t i = 0;
#if INT8_SUM
    enum { STEP = INT8_SUM / 32 };
    NAMED(sums8) inputs[PART_INPUTS / 2];
    for (int k = 0; k < K; k++) {
        int32_t both;
        memcpy(&both, x[k], sizeof(both));
        inputs[k] = SPREAD16(both);
    }
    for (; i + STEP <= n; i += STEP) {
        NAMED(sums8) sum = LOAD16(sums + i);
        for (int k = 0; k < K; k++) sum = ADD8(sum, LOAD16(pairs[k] + 2 * i), inputs[k]);
        STORE16(sums + i, sum);
    }
#endif
    for (; i < n; i++)
        for (int k = 0; k < K; k++)
            sums[i] += pairs[k][2 * i] * x[k][0] + pairs[k][2 * i + 1] * x[k][1];
}

static void NAMED(part_int8)(const Linear *linear, const Input *input, const Some *some, int row,
                             int num_rows, int64_t first, int64_t end, int64_t output,
                             int64_t num_outputs, int32_t *out) {
    enum { PAIRS = PART_INPUTS / 2 };
    int64_t n = linear->num_outputs;
    const int8_t *weight = (const int8_t *)linear->weight + output;
    int16_t paired[PAIRS][2 * PART_OUTPUTS] __attribute__((aligned(64)));
    for (int64_t i = first; i < end; i += PART_INPUTS) {
        int16_t x[MAX_TILE_ROWS][PART_INPUTS] = {0};
        int is_used[PAIRS] = {0};
        int num_inputs = end - i < PART_INPUTS ? (int)(end - i) : PART_INPUTS;
        int64_t ids[2 * PART_INPUTS];
        for (int k = 0; k < 2 * PART_INPUTS; k++) ids[k] = some_id(some, i + k);
        for (int r = 0; r < num_rows; r++) {
            const int16_t *from = input->quantized + (row + r) * input->row_stride;
            for (int k = 0; k < num_inputs; k++) x[r][k] = from[ids[k]];
            for (int p = 0; p < PAIRS; p++) is_used[p] |= x[r][2 * p] | x[r][2 * p + 1];
        }
        for (int p = 0; p < PAIRS; p++) {
            if (!is_used[p]) continue;
            const int64_t *of = ids + 2 * p, *then = of + PART_INPUTS;
            NAMED(pair_up)(weight + of[0] * n, weight + of[1] * n, num_outputs, weight + then[0] * n,
                           weight + then[1] * n, paired[p]);
        }
        for (int r = 0; r < num_rows; r++) {
            int32_t *sums = out + (row + r) * n + output;
            const int16_t *inputs[PAIRS], *pairs[PAIRS];
            int num_used = 0;
            for (int p = 0; p < PAIRS; p++) {
                inputs[num_used] = x[r] + 2 * p;
                pairs[num_used] = paired[p];
                num_used += (x[r][2 * p] | x[r][2 * p + 1]) != 0;
            }
            switch (num_used) {
            case 4: NAMED(add_pairs)(sums, inputs, pairs, 4, num_outputs); break;
            case 3: NAMED(add_pairs)(sums, inputs, pairs, 3, num_outputs); break;
            case 2: NAMED(add_pairs)(sums, inputs, pairs, 2, num_outputs); break;
            case 1: NAMED(add_pairs)(sums, inputs, pairs, 1, num_outputs); break;
            }
        }
    }
}

/* Rows in groups and outputs in blocks, whose sums stay in the first cache. */
static void NAMED(linear_part)(const Linear *linear, const Input *input, const Some *some,
                               int64_t first, int64_t end, void *out) {
    int64_t n = linear->num_outputs, num_blocks = (n + PART_OUTPUTS - 1) / PART_OUTPUTS;
    int64_t block = ((n + num_blocks - 1) / num_blocks + 15) / 16 * 16;
    memset(out, 0, (size_t)(input->num_rows * n) * sizeof(int32_t));
    for (int row = 0; row < input->num_rows; row += MAX_TILE_ROWS) {
        int num_rows = smaller_of(input->num_rows - row, MAX_TILE_ROWS);
        for (int64_t output = 0; output < n; output += block) {
            int64_t size = n - output < block ? n - output : block;
            if (linear->scale == NULL)
                NAMED(part_float)(linear, input, some, row, num_rows, first, end, output, size, out);
            else
                NAMED(part_int8)(linear, input, some, row, num_rows, first, end, output, size, out);
        }
    }
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

/* With up = 1: the same bits times up are those of silu_mul. */
static void NAMED(silu)(float *gate, int64_t n) {
    int64_t i = 0;
    VEC one = (VEC){0} + 1.0f;
    for (; i + LANES <= n; i += LANES) STORE(gate + i, NAMED(swiglu)(LOAD(gate + i), one));
    if (i < n) {
        float gates[LANES] = {0};
        memcpy(gates, gate + i, (size_t)(n - i) * sizeof(float));
        STORE(gates, NAMED(swiglu)(LOAD(gates), one));
        memcpy(gate + i, gates, (size_t)(n - i) * sizeof(float));
    }
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

/* Scores of Q queries at T positions: weights[q][t] = scale * query q . key t. */
INLINE void NAMED(score)(const AttentionPart *part, const int64_t *offsets, int64_t t, int T,
                         int first, int Q, float scale) {
    int64_t head_dim = part->head_dim, k = 0;
    const float *queries = part->queries + first * head_dim;
    VEC sums[4][2];
    for (int q = 0; q < Q; q++)
        for (int i = 0; i < T; i++) sums[q][i] = (VEC){0};
    for (; k + LANES <= head_dim; k += LANES) {
        for (int q = 0; q < Q; q++) {
            VEC query = LOAD(queries + q * head_dim + k);
            for (int i = 0; i < T; i++) sums[q][i] += query * LOAD(part->keys + offsets[t + i] + k);
        }
    }
    for (int q = 0; q < Q; q++) {
        for (int i = 0; i < T; i++) {
            const float *query = queries + q * head_dim, *key = part->keys + offsets[t + i];
            float sum = NAMED(sum)(sums[q][i]);
            for (int64_t d = k; d < head_dim; d++) sum += query[d] * key[d];
            part->weights[(first + q) * part->weight_stride + t + i] = scale * sum;
        }
    }
}

/* out[q][d] for D times LANES values of d on: the weighted sum of the values. */
INLINE void NAMED(mix)(const AttentionPart *part, const int64_t *offsets, int64_t n, int first,
                       int Q, int64_t d, int D) {
    int64_t stride = part->weight_stride;
    const float *weights = part->weights + first * stride;
    VEC sums[4][4];
    for (int q = 0; q < Q; q++)
        for (int i = 0; i < D; i++) sums[q][i] = (VEC){0};
    for (int64_t t = 0; t < n; t++) {
        const float *value = part->values + offsets[t] + d;
        for (int q = 0; q < Q; q++)
            for (int i = 0; i < D; i++)
                sums[q][i] += weights[q * stride + t] * LOAD(value + i * LANES);
    }
    for (int q = 0; q < Q; q++)
        for (int i = 0; i < D; i++)
            STORE(part->out + (first + q) * part->head_dim + d + i * LANES, sums[q][i]);
}

/* e^(weight - max) of one query; its maximum and sum are kept to merge chunks. */
INLINE void NAMED(exponentials)(const AttentionPart *part, int64_t n, int q) {
    float *weights = part->weights + q * part->weight_stride;
    int64_t end = (n + LANES - 1) / LANES * LANES; /* weight_stride has room for it */
    for (int64_t t = n; t < end; t++) weights[t] = -INFINITY;
    VEC maxima = LOAD(weights);
    for (int64_t t = LANES; t < end; t += LANES) {
        VEC scores = LOAD(weights + t);
        IVEC is_more = scores > maxima;
        maxima = (VEC)(((IVEC)scores & is_more) | ((IVEC)maxima & ~is_more));
    }
    float max = maxima[0];
    for (int lane = 1; lane < LANES; lane++) max = maxima[lane] > max ? maxima[lane] : max;
    VEC sums = {0};
    for (int64_t t = 0; t < end; t += LANES) {
        VEC powers = NAMED(exp)(LOAD(weights + t) - max);
        if (t + LANES > n) {
            STORE(weights + t, powers);
            for (int64_t late = n; late < end; late++) weights[late] = 0;
            powers = LOAD(weights + t);
        }
        STORE(weights + t, powers);
        sums += powers;
    }
    part->maxima[q] = max;
    part->sums[q] = NAMED(sum)(sums);
}

INLINE void NAMED(attend_queries)(const AttentionPart *part, const int64_t *offsets, int64_t n,
                                  int first, int Q) {
    enum { D = 2 }; /* with four queries, as many sums as the processor adds at a time */
    int64_t head_dim = part->head_dim, d = 0, t = 0;
    float scale = 1.0f / sqrtf((float)head_dim);
    for (; t + 2 <= n; t += 2) {
        if (first == 0) fetch_ahead(part, offsets, t, n);
        NAMED(score)(part, offsets, t, 2, first, Q, scale);
    }
    if (t < n) NAMED(score)(part, offsets, t, 1, first, Q, scale);
    for (int q = first; q < first + Q; q++) NAMED(exponentials)(part, n, q);
    for (; d + D * LANES <= head_dim; d += D * LANES) NAMED(mix)(part, offsets, n, first, Q, d, D);
    for (; d + LANES <= head_dim; d += LANES) NAMED(mix)(part, offsets, n, first, Q, d, 1);
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
    .linear_some = NAMED(linear_some),
    .linear_part = NAMED(linear_part),
    .leave_out = NAMED(leave_out),
    .silu = NAMED(silu),
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
#undef SPREAD16
#undef STORE16
#undef HALF8
