/* The loops that touch weights, keys and values, one set for each instruction set (simd.c). */
#ifndef SKIPLLM_SIMD_H
#define SKIPLLM_SIMD_H

#include <stdint.h>

/* Weights [num_outputs, num_inputs], or where they lie input by input [num_inputs, num_outputs], and
 * what follows the product. */
typedef struct {
    const void *weight;  /* float, or int8_t where there is a scale */
    const float *scale;  /* NULL, or [num_outputs]: weight = scale * int8 */
    const float *bias;   /* NULL, or [num_outputs] */
    int64_t num_outputs, num_inputs;
} Linear;

/* The input rows of a linear, as floats or, for int8 weights, as 12-bit integers (Simd.quantize).
 * Rows lie row_stride elements apart. */
typedef struct {
    const float *values;
    const int16_t *quantized;
    const float *scales; /* [num_rows], of the quantized ones */
    int64_t row_stride;
    int num_rows;
} Input;

/* Inputs or outputs of a linear: those listed, ascending, or where ids is NULL all. */
typedef struct {
    const int32_t *ids;
    int64_t num;
    int64_t offset; /* of the first output meant, in a linear of several matrices */
} Some;

#define MAX_POSITIONS 256 /* of one AttentionPart */

/* A row's part of attention: the query heads of one KV head over positions [first, end). */
typedef struct {
    const float *queries;         /* [num_queries, head_dim] */
    const float *keys, *values;   /* a layer's cache: [slots, num_kv_heads, head_dim] */
    const int32_t *block_table;
    int64_t block_size, kv_stride; /* num_kv_heads * head_dim */
    int64_t kv_offset;             /* kv_head * head_dim */
    int64_t first, end;
    int num_queries;
    int64_t head_dim;
    float *weights;               /* scratch [num_queries, weight_stride >= MAX_POSITIONS] */
    int64_t weight_stride;
    float *maxima, *sums, *out;   /* [num_queries] twice, [num_queries, head_dim]: not normalised */
} AttentionPart;

typedef struct {
    const char *name;
    /* out[row * out_stride + output - first] for outputs in [first, end), bias added. The sum of an
     * output is taken in the same order whatever the number of rows: a row's result does not
     * depend on its batch mates, bit for bit. */
    void (*linear)(const Linear *linear, const Input *input, int64_t first, int64_t end, float *out,
                   int64_t out_stride);
    /* The same for some outputs: entries [first, end) of the list. */
    void (*linear_some)(const Linear *linear, const Input *input, const Some *outputs, int64_t first,
                        int64_t end, float *out, int64_t out_stride);
    /* Of a linear that lies input by input: out [num_rows, num_outputs] = the sums, in the order of
     * the inputs, over entries [first, end) of the inputs, without scales and bias. They are floats
     * or, for int8 weights and at most INT8_SUM_MAX inputs, int32_t. An input that is 0 is not
     * multiplied, and an input that is not listed counts as 0. Bits as above. */
    void (*linear_part)(const Linear *linear, const Input *input, const Some *inputs, int64_t first,
                        int64_t end, void *out);
    /* Makes x[i] 0 where |x[i]| * norms[i] < threshold, and returns how many; wanted[i] |= -1 where
     * it is not. */
    int64_t (*leave_out)(float *x, const float *norms, float threshold, int32_t *wanted, int64_t n);
    void (*attend)(const AttentionPart *part);
    /* gate[i] = silu(gate[i]), and that * up[i] */
    void (*silu)(float *gate, int64_t n);
    void (*silu_mul)(float *gate, const float *up, int64_t n);
    float (*dot)(const float *a, const float *b, int64_t n);
    /* x[n] as scale * integers of at most QUANTIZED_MAX; returns the scale, NaN where x has an
     * infinity or a NaN. */
    float (*quantize)(const float *x, int64_t n, int16_t *quantized);
} Simd;

#define QUANTIZED_MAX 2047
#define INT8_SUM_MAX 8192 /* products of these with weights in [-127, 127] whose sum fits 32 bits */

/* The best set for this machine. */
const Simd *simd_best(void);

#endif
