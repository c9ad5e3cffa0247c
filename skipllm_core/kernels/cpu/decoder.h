/* The decode step of a Llama-family model on the CPU: what one layer does to a few rows. */
#ifndef SKIPLLM_DECODER_H
#define SKIPLLM_DECODER_H

#include <stdint.h>

#include "neurons.h"
#include "simd.h"

typedef struct {
    int64_t hidden, inner;  /* inner: of the feed-forward */
    int64_t num_heads, num_kv_heads, head_dim;
    int64_t block_size, max_blocks; /* of a sequence */
    int64_t max_rows;
    float eps;
} Shape;

typedef struct {
    const float *norm1, *norm2; /* [hidden] */
    const float *down_norms;    /* [inner]: of the columns of down */
    const float *qk_norm;       /* NULL, or [num_heads + num_kv_heads, head_dim] */
    Linear qkv, o, gate_up, down; /* down lies input by input */
    float *keys, *values; /* [num_blocks, block_size, num_kv_heads, head_dim] */
    int64_t window;       /* 0: none */
} Layer;

typedef struct Decoder Decoder;

/* cos and sin: [positions, head_dim / 2]. NULL when there is not enough memory or no thread. */
Decoder *decoder_new(const Shape *shape, const float *cos, const float *sin, int num_threads);
void decoder_free(Decoder *decoder);
const char *decoder_simd(const Decoder *decoder);

/* Sets the rows of a step: h[row] = embedding[token_ids[row]], a token at positions[row]. The
 * caller has filled decoder_block_tables() [max_rows, max_blocks] before. */
void decoder_begin(Decoder *decoder, const float *embedding, int num_rows,
                   const int64_t *token_ids, const int64_t *positions);
int32_t *decoder_block_tables(Decoder *decoder);

/* h += Attn(norm1(h)) for every row; K and V are written. */
void decoder_attend(Decoder *decoder, const Layer *layer);

/* h += FFN(norm2(h)) for the given rows. similarities: NULL, or [num_rows]: the cosine of h before
 * and after, for those rows. neurons: NULL, or what those rows leave out; its norms are the layer's. */
void decoder_feed_forward(Decoder *decoder, const Layer *layer, const int *rows, int num_rows,
                          float *similarities, Neurons *neurons);

/* logits [num_rows, head->num_outputs] = head(norm(h)) of the given rows. */
void decoder_head(Decoder *decoder, const float *norm, const Linear *head, const int *rows,
                  int num_rows, float *logits);

#endif
