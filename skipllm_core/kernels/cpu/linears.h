/* Linears over the rows of a step, their outputs spread over the pool. */
#ifndef SKIPLLM_LINEARS_H
#define SKIPLLM_LINEARS_H

#include "pool.h"
#include "simd.h"

/* What computes, and room for the rounded inputs of one linear. */
typedef struct {
    const Simd *simd;
    Pool *pool;
    int16_t *quantized; /* [max_rows, the widest input] */
    float *scales;      /* [max_rows] */
} Workers;

/* x [num_rows, linear->num_inputs] as the linear takes it; for int8 weights until the next one. */
Input input_of(const Workers *workers, const Linear *linear, const float *x, int num_rows);

/* Outputs of one item of a loop, where an output has `bytes` of weights. */
int64_t outputs_per_item(const Pool *pool, int64_t num_outputs, int64_t bytes);
/* No item has more outputs, where an output has so many inputs of a byte or more. */
int64_t most_outputs_per_item(int64_t num_inputs, int64_t num_outputs);

int64_t weight_bytes(const Linear *linear); /* of one element */

/* out [num_rows, num_outputs] = x W^T + b of a linear that lies output by output. */
void linear_apply(const Workers *workers, const Linear *linear, const float *x, int num_rows,
                  float *out);

#endif
