#include "decoder.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "feed_forward.h"
#include "memory.h"

#define CHUNK MAX_POSITIONS /* of an item of attention; fixed, so that sums do not vary */

struct Decoder {
    Memory memory;
    Shape shape;
    Workers workers;
    FeedForward *ffn;
    const float *cos, *sin;
    int num_rows;
    int64_t *positions;    /* [max_rows] */
    int32_t *block_tables; /* [max_rows, max_blocks] */
    float *h;              /* [max_rows, hidden] */
    float *x;              /* [max_rows, hidden]: a linear's input, or what it gives to add to h */
    float *qkv;            /* [max_rows, (num_heads + 2 num_kv_heads) head_dim] */
    float *mixed;          /* [max_rows, num_heads head_dim]: attention's output */
    float *weights;        /* [num_threads, num_heads / num_kv_heads, CHUNK] */
    float *maxima, *sums, *partial; /* [max_rows, chunks, num_heads (head_dim)] */
};

static int64_t max_chunks(const Shape *shape) {
    return (shape->block_size * shape->max_blocks + CHUNK - 1) / CHUNK;
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

Decoder *decoder_new(const Shape *shape, const float *cos, const float *sin, int num_threads) {
    Decoder *decoder = calloc(1, sizeof(Decoder));
    if (decoder == NULL) return NULL;
    int64_t rows = shape->max_rows, heads = shape->num_heads, head_dim = shape->head_dim;
    int64_t group = heads / shape->num_kv_heads;
    int64_t widest = larger(larger(shape->hidden, shape->inner), heads * head_dim);
    decoder->shape = *shape;
    decoder->cos = cos;
    decoder->sin = sin;
    int64_t qkv_size = (heads + 2 * shape->num_kv_heads) * head_dim;
    int64_t num_partial = rows * max_chunks(shape) * heads;
    decoder->ffn = feed_forward_new(shape->hidden, shape->inner, rows, num_threads);
    Pool *pool = pool_new(num_threads);
    Memory *memory = &decoder->memory;
    decoder->positions = memory_zeros(memory, rows, sizeof(int64_t));
    decoder->block_tables = memory_zeros(memory, rows * shape->max_blocks, sizeof(int32_t));
    decoder->h = memory_zeros(memory, rows * shape->hidden, sizeof(float));
    decoder->x = memory_zeros(memory, rows * shape->hidden, sizeof(float));
    decoder->qkv = memory_zeros(memory, rows * qkv_size, sizeof(float));
    decoder->mixed = memory_zeros(memory, rows * heads * head_dim, sizeof(float));
    decoder->workers = (Workers){
        simd_best(),
        pool,
        memory_zeros(memory, rows * widest, sizeof(int16_t)),
        memory_zeros(memory, rows, sizeof(float)),
    };
    decoder->weights = memory_zeros(memory, num_threads * group * CHUNK, sizeof(float));
    decoder->maxima = memory_zeros(memory, num_partial, sizeof(float));
    decoder->sums = memory_zeros(memory, num_partial, sizeof(float));
    decoder->partial = memory_zeros(memory, num_partial * head_dim, sizeof(float));
    if (pool != NULL && decoder->ffn != NULL && !memory->is_short) return decoder;
    decoder_free(decoder);
    return NULL;
}

void decoder_free(Decoder *decoder) {
    if (decoder->workers.pool != NULL) pool_free(decoder->workers.pool);
    if (decoder->ffn != NULL) feed_forward_free(decoder->ffn);
    memory_free(&decoder->memory);
    free(decoder);
}

const char *decoder_simd(const Decoder *decoder) { return decoder->workers.simd->name; }
int32_t *decoder_block_tables(Decoder *decoder) { return decoder->block_tables; }

void decoder_begin(Decoder *decoder, const float *embedding, int num_rows,
                   const int64_t *token_ids, const int64_t *positions) {
    int64_t hidden = decoder->shape.hidden;
    decoder->num_rows = num_rows;
    for (int row = 0; row < num_rows; row++) {
        decoder->positions[row] = positions[row];
        memcpy(decoder->h + row * hidden, embedding + token_ids[row] * hidden,
               (size_t)hidden * sizeof(float));
    }
}

/* The small things, on the caller's thread ------------------------------------------------------*/

static void rms_norm(const Decoder *decoder, const float *x, const float *weight, int64_t n,
                     float *out) {
    float mean = decoder->workers.simd->dot(x, x, n) / (float)n;
    float factor = 1.0f / sqrtf(mean + decoder->shape.eps);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * factor * weight[i];
}

/* Queries and keys of a row: the norm of the heads, if there is one, and the rotation. */
static void place_heads(const Decoder *decoder, const Layer *layer, float *heads, int64_t position) {
    int64_t head_dim = decoder->shape.head_dim, half = head_dim / 2;
    const float *cos = decoder->cos + position * half, *sin = decoder->sin + position * half;
    int64_t num_heads = decoder->shape.num_heads + decoder->shape.num_kv_heads;
    for (int64_t head = 0; head < num_heads; head++) {
        float *x = heads + head * head_dim;
        if (layer->qk_norm != NULL) {
            rms_norm(decoder, x, layer->qk_norm + head * head_dim, head_dim, x);
        }
        for (int64_t i = 0; i < half; i++) {
            float a = x[i], b = x[i + half];
            x[i] = a * cos[i] - b * sin[i];
            x[i + half] = b * cos[i] + a * sin[i];
        }
    }
}

static void write_cache(const Decoder *decoder, const Layer *layer, int row) {
    const Shape *shape = &decoder->shape;
    int64_t kv_size = shape->num_kv_heads * shape->head_dim, position = decoder->positions[row];
    int64_t q_size = shape->num_heads * shape->head_dim;
    const float *key = decoder->qkv + row * (q_size + 2 * kv_size) + q_size;
    int64_t block =
        decoder->block_tables[row * shape->max_blocks + position / shape->block_size];
    int64_t slot = block * shape->block_size + position % shape->block_size;
    memcpy(layer->keys + slot * kv_size, key, (size_t)kv_size * sizeof(float));
    memcpy(layer->values + slot * kv_size, key + kv_size, (size_t)kv_size * sizeof(float));
}

/* Attention -------------------------------------------------------------------------------------*/

typedef struct {
    Decoder *decoder;
    const Layer *layer;
    int64_t chunks_per_row, num_parts, parts_per_item;
} AttentionTask;

static int64_t first_seen(const Layer *layer, int64_t position) {
    return layer->window > 0 ? larger(0, position - layer->window + 1) : 0;
}

/* One KV head of one row over one chunk of positions. */
static void attend_part(const AttentionTask *task, int64_t index, int thread) {
    Decoder *decoder = task->decoder;
    const Shape *shape = &decoder->shape;
    int64_t heads = shape->num_heads, kv_heads = shape->num_kv_heads, head_dim = shape->head_dim;
    int64_t group = heads / kv_heads;
    int64_t kv_head = index % kv_heads, chunk = index / kv_heads % task->chunks_per_row;
    int64_t row = index / kv_heads / task->chunks_per_row, position = decoder->positions[row];
    int64_t first = larger(chunk * CHUNK, first_seen(task->layer, position));
    int64_t end = smaller((chunk + 1) * CHUNK, position + 1);
    if (first >= end) return;
    int64_t head = (row * max_chunks(shape) + chunk) * heads + kv_head * group;
    AttentionPart part = {
        .queries = decoder->qkv + row * (heads + 2 * kv_heads) * head_dim + kv_head * group * head_dim,
        .keys = task->layer->keys,
        .values = task->layer->values,
        .block_table = decoder->block_tables + row * shape->max_blocks,
        .block_size = shape->block_size,
        .kv_stride = kv_heads * head_dim,
        .kv_offset = kv_head * head_dim,
        .first = first,
        .end = end,
        .num_queries = (int)group,
        .head_dim = head_dim,
        .weights = decoder->weights + thread * group * CHUNK,
        .weight_stride = CHUNK,
        .maxima = decoder->maxima + head,
        .sums = decoder->sums + head,
        .out = decoder->partial + head * head_dim,
    };
    decoder->workers.simd->attend(&part);
}

static void attend_item(void *context, int64_t item, int thread) {
    AttentionTask *task = context;
    int64_t first = item * task->parts_per_item;
    int64_t end = smaller(first + task->parts_per_item, task->num_parts);
    for (int64_t part = first; part < end; part++) attend_part(task, part, thread);
}

/* The chunks of a head, each relative to its own maximum, as one softmax. */
static void merge_chunks(const Decoder *decoder, const Layer *layer, int row, int64_t head) {
    const Shape *shape = &decoder->shape;
    int64_t position = decoder->positions[row], head_dim = shape->head_dim;
    int64_t first = first_seen(layer, position) / CHUNK, last = position / CHUNK;
    int64_t base = row * max_chunks(shape) * shape->num_heads + head, step = shape->num_heads;
    float max = -INFINITY, sum = 0;
    for (int64_t chunk = first; chunk <= last; chunk++) {
        max = fmaxf(max, decoder->maxima[base + chunk * step]);
    }
    float *out = decoder->mixed + (row * shape->num_heads + head) * head_dim;
    memset(out, 0, (size_t)head_dim * sizeof(float));
    for (int64_t chunk = first; chunk <= last; chunk++) {
        int64_t at = base + chunk * step;
        float factor = expf(decoder->maxima[at] - max);
        sum += factor * decoder->sums[at];
        for (int64_t i = 0; i < head_dim; i++) out[i] += factor * decoder->partial[at * head_dim + i];
    }
    for (int64_t i = 0; i < head_dim; i++) out[i] /= sum;
}

/* The halves of a layer -------------------------------------------------------------------------*/

void decoder_attend(Decoder *decoder, const Layer *layer) {
    const Shape *shape = &decoder->shape;
    int64_t hidden = shape->hidden, num_rows = decoder->num_rows, longest = 0;
    int64_t heads_size = (shape->num_heads + 2 * shape->num_kv_heads) * shape->head_dim;
    for (int64_t row = 0; row < num_rows; row++) {
        rms_norm(decoder, decoder->h + row * hidden, layer->norm1, hidden, decoder->x + row * hidden);
        longest = larger(longest, decoder->positions[row]);
    }
    linear_apply(&decoder->workers, &layer->qkv, decoder->x, (int)num_rows, decoder->qkv);
    for (int row = 0; row < num_rows; row++) {
        place_heads(decoder, layer, decoder->qkv + row * heads_size, decoder->positions[row]);
        write_cache(decoder, layer, row);
    }
    int64_t chunks_per_row = longest / CHUNK + 1;
    int64_t num_parts = num_rows * chunks_per_row * shape->num_kv_heads;
    int64_t parts_per_item = (num_parts + POOL_MAX_ITEMS - 1) / POOL_MAX_ITEMS;
    AttentionTask task = {decoder, layer, chunks_per_row, num_parts, parts_per_item};
    pool_run(decoder->workers.pool, attend_item, &task, (num_parts + parts_per_item - 1) / parts_per_item);
    for (int row = 0; row < num_rows; row++) {
        for (int64_t head = 0; head < shape->num_heads; head++) {
            merge_chunks(decoder, layer, row, head);
        }
    }
    linear_apply(&decoder->workers, &layer->o, decoder->mixed, (int)num_rows, decoder->x);
    for (int64_t i = 0; i < num_rows * hidden; i++) decoder->h[i] += decoder->x[i];
}

void decoder_feed_forward(Decoder *decoder, const Layer *layer, const int *rows, int num_rows,
                          float *similarities, Neurons *neurons) {
    int64_t hidden = decoder->shape.hidden;
    for (int i = 0; i < num_rows; i++) {
        rms_norm(decoder, decoder->h + rows[i] * hidden, layer->norm2, hidden,
                 decoder->x + i * hidden);
    }
    if (neurons != NULL) neurons->norms = layer->down_norms;
    feed_forward_run(decoder->ffn, &decoder->workers, &layer->gate_up, &layer->down, decoder->x,
                     num_rows, decoder->h, rows, similarities, neurons);
}

void decoder_head(Decoder *decoder, const float *norm, const Linear *head, const int *rows,
                  int num_rows, float *logits) {
    int64_t hidden = decoder->shape.hidden;
    for (int i = 0; i < num_rows; i++) {
        rms_norm(decoder, decoder->h + rows[i] * hidden, norm, hidden, decoder->x + i * hidden);
    }
    linear_apply(&decoder->workers, head, decoder->x, num_rows, logits);
}
