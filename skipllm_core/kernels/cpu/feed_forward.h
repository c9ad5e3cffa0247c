/* The gated feed-forward of a layer: h += W_down(silu(W_gate x) * W_up x). */
#ifndef SKIPLLM_FEED_FORWARD_H
#define SKIPLLM_FEED_FORWARD_H

#include "linears.h"
#include "neurons.h"

typedef struct FeedForward FeedForward; /* the memory that it needs between its loops */

/* NULL when there is not enough memory. */
FeedForward *feed_forward_new(int64_t hidden, int64_t inner, int64_t max_rows, int num_threads);
void feed_forward_free(FeedForward *ffn);

/* gate_up [2 inner, hidden] lies output by output, down [hidden, inner] input by input: neuron by
 * neuron both. x [num_rows, hidden] is what goes in; what comes out is added to h[rows[i]].
 * similarities: NULL, or [num_rows]: the cosine of h before and after. neurons: NULL, or what the
 * rows leave out: weights that none of them wants are not read. */
void feed_forward_run(FeedForward *ffn, const Workers *workers, const Linear *gate_up,
                      const Linear *down, const float *x, int num_rows, float *h, const int *rows,
                      float *similarities, Neurons *neurons);

#endif
