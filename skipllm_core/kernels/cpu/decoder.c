#include "decoder.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "pool.h"

/* Bytes of weights in an item: few, so that the last one is soon done. A thread's items are neighbours,
 * so it reads long runs all the same. */
#define MIN_ITEM_BYTES 16384
#define MAX_ITEM_BYTES 32768
#define ITEMS_PER_THREAD 16
#define CHUNK MAX_POSITIONS /* of an item of attention; fixed, so that sums do not vary */

struct Decoder {
    Shape shape;
    const Simd *simd;
    Pool *pool;
    const float *cos, *sin;
    int num_rows;
    int64_t *positions;    /* [max_rows] */
    int32_t *block_tables; /* [max_rows, max_blocks] */
    float *h;              /* [max_rows, hidden] */
    float *x;              /* [max_rows, hidden]: a linear's input, or what it gives to add to h */
    float *qkv;            /* [max_rows, (num_heads + 2 num_kv_heads) head_dim] */
    float *mixed;          /* [max_rows, num_heads head_dim]: attention's output */
    float *act;            /* [max_rows, inner] */
    int16_t *quantized;    /* [max_rows, the widest input] */
    float *scales;         /* [max_rows] */
    float *up;             /* [num_threads, max_rows, item's outputs] */
    int64_t item_outputs_max;
    float *weights;        /* [num_threads, num_heads / num_kv_heads, CHUNK] */
    float *maxima, *sums, *partial; /* [max_rows, chunks, num_heads (head_dim)] */
};

static int64_t max_chunks(const Shape *shape) {
    return (shape->block_size * shape->max_blocks + CHUNK - 1) / CHUNK;
}

/* `num` elements of `bytes` each, all 0; NULL makes *is_complete false. */
static void *zeros(int64_t num, size_t bytes, bool *is_complete) {
    void *buffer = calloc((size_t)num, bytes);
    *is_complete = *is_complete && buffer != NULL;
    return buffer;
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Outputs of one item, where an output has `bytes` of weights. */
static int64_t outputs_per_item(const Pool *pool, int64_t num_outputs, int64_t bytes) {
    int64_t fair = num_outputs * bytes / (ITEMS_PER_THREAD * pool_num_threads(pool));
    int64_t item_bytes = larger(MIN_ITEM_BYTES, smaller(MAX_ITEM_BYTES, fair));
    int64_t outputs = larger(item_bytes / bytes, num_outputs / POOL_MAX_ITEMS + 1);
    return (outputs + 3) / 4 * 4;
}

static int64_t row_bytes(const Linear *linear) {
    return linear->num_inputs * (linear->scale == NULL ? (int64_t)sizeof(float) : 1);
}

Decoder *decoder_new(const Shape *shape, const float *cos, const float *sin, int num_threads) {
    Decoder *decoder = calloc(1, sizeof(Decoder));
    if (decoder == NULL) return NULL;
    int64_t rows = shape->max_rows, heads = shape->num_heads, head_dim = shape->head_dim;
    int64_t group = heads / shape->num_kv_heads;
    int64_t widest = larger(larger(shape->hidden, shape->inner), heads * head_dim);
    decoder->shape = *shape;
    decoder->simd = simd_best();
    decoder->cos = cos;
    decoder->sin = sin;
    decoder->pool = pool_new(num_threads);
    /* An item of int8 weights has the most outputs. */
    decoder->item_outputs_max = MAX_ITEM_BYTES / shape->hidden + shape->inner / POOL_MAX_ITEMS + 8;
    int64_t qkv_size = (heads + 2 * shape->num_kv_heads) * head_dim;
    int64_t up_size = rows * decoder->item_outputs_max, num_partial = rows * max_chunks(shape) * heads;
    bool is_complete = decoder->pool != NULL;
    decoder->positions = zeros(rows, sizeof(int64_t), &is_complete);
    decoder->block_tables = zeros(rows * shape->max_blocks, sizeof(int32_t), &is_complete);
    decoder->h = zeros(rows * shape->hidden, sizeof(float), &is_complete);
    decoder->x = zeros(rows * shape->hidden, sizeof(float), &is_complete);
    decoder->qkv = zeros(rows * qkv_size, sizeof(float), &is_complete);
    decoder->mixed = zeros(rows * heads * head_dim, sizeof(float), &is_complete);
    decoder->act = zeros(rows * shape->inner, sizeof(float), &is_complete);
    decoder->quantized = zeros(rows * widest, sizeof(int16_t), &is_complete);
    decoder->scales = zeros(rows, sizeof(float), &is_complete);
    decoder->up = zeros(num_threads * up_size, sizeof(float), &is_complete);
    decoder->weights = zeros(num_threads * group * CHUNK, sizeof(float), &is_complete);
    decoder->maxima = zeros(num_partial, sizeof(float), &is_complete);
    decoder->sums = zeros(num_partial, sizeof(float), &is_complete);
    decoder->partial = zeros(num_partial * head_dim, sizeof(float), &is_complete);
    if (is_complete) return decoder;
    decoder_free(decoder);
    return NULL;
}

void decoder_free(Decoder *decoder) {
    if (decoder->pool != NULL) pool_free(decoder->pool);
    void *buffers[] = {decoder->positions, decoder->block_tables, decoder->h,       decoder->x,
                       decoder->qkv,       decoder->mixed,        decoder->act,     decoder->quantized,
                       decoder->scales,    decoder->up,           decoder->weights, decoder->maxima,
                       decoder->sums,      decoder->partial};
    for (size_t i = 0; i < sizeof(buffers) / sizeof(buffers[0]); i++) free(buffers[i]);
    free(decoder);
}

const char *decoder_simd(const Decoder *decoder) { return decoder->simd->name; }
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

/* Linears ---------------------------------------------------------------------------------------*/

static Input input_of(Decoder *decoder, const Linear *linear, const float *x, int num_rows) {
    int64_t n = linear->num_inputs;
    if (linear->scale != NULL) {
        for (int row = 0; row < num_rows; row++) {
            decoder->scales[row] =
                decoder->simd->quantize(x + row * n, n, decoder->quantized + row * n);
        }
    }
    return (Input){x, decoder->quantized, decoder->scales, n, num_rows};
}

typedef struct {
    Decoder *decoder;
    const Linear *linear;
    Input input;
    int64_t outputs_per_item;
    float *out;
    int64_t out_stride;
} LinearTask;

static void linear_item(void *context, int64_t item, int thread) {
    (void)thread;
    LinearTask *task = context;
    int64_t first = item * task->outputs_per_item;
    int64_t end = smaller(first + task->outputs_per_item, task->linear->num_outputs);
    task->decoder->simd->linear(task->linear, &task->input, first, end, task->out + first,
                                task->out_stride);
}

static void apply(Decoder *decoder, const Linear *linear, const float *x, int num_rows, float *out) {
    LinearTask task = {decoder, linear, input_of(decoder, linear, x, num_rows),
                       outputs_per_item(decoder->pool, linear->num_outputs, row_bytes(linear)), out,
                       linear->num_outputs};
    int64_t num_items =
        (linear->num_outputs + task.outputs_per_item - 1) / task.outputs_per_item;
    pool_run(decoder->pool, linear_item, &task, num_items);
}

/* Gate and up of the same outputs in one item, and silu(gate) * up while both are at hand. */
static void gate_up_item(void *context, int64_t item, int thread) {
    LinearTask *task = context;
    Decoder *decoder = task->decoder;
    int64_t inner = decoder->shape.inner, stride = decoder->item_outputs_max;
    int64_t first = item * task->outputs_per_item;
    int64_t end = smaller(first + task->outputs_per_item, inner);
    float *up = decoder->up + thread * decoder->shape.max_rows * stride;
    decoder->simd->linear(task->linear, &task->input, first, end, task->out + first, inner);
    decoder->simd->linear(task->linear, &task->input, inner + first, inner + end, up, stride);
    for (int row = 0; row < task->input.num_rows; row++) {
        decoder->simd->silu_mul(task->out + row * inner + first, up + row * stride, end - first);
    }
}

static void gate_up(Decoder *decoder, const Linear *linear, int num_rows) {
    int64_t inner = decoder->shape.inner;
    LinearTask task = {decoder, linear, input_of(decoder, linear, decoder->x, num_rows),
                       outputs_per_item(decoder->pool, inner, 2 * row_bytes(linear)), decoder->act, inner};
    pool_run(decoder->pool, gate_up_item, &task,
             (inner + task.outputs_per_item - 1) / task.outputs_per_item);
}

/* The small things, on the caller's thread ------------------------------------------------------*/

static void rms_norm(const Decoder *decoder, const float *x, const float *weight, int64_t n,
                     float *out) {
    float mean = decoder->simd->dot(x, x, n) / (float)n;
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
    decoder->simd->attend(&part);
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
    apply(decoder, &layer->qkv, decoder->x, (int)num_rows, decoder->qkv);
    for (int row = 0; row < num_rows; row++) {
        place_heads(decoder, layer, decoder->qkv + row * heads_size, decoder->positions[row]);
        write_cache(decoder, layer, row);
    }
    int64_t chunks_per_row = longest / CHUNK + 1;
    int64_t num_parts = num_rows * chunks_per_row * shape->num_kv_heads;
    int64_t parts_per_item = (num_parts + POOL_MAX_ITEMS - 1) / POOL_MAX_ITEMS;
    AttentionTask task = {decoder, layer, chunks_per_row, num_parts, parts_per_item};
    pool_run(decoder->pool, attend_item, &task, (num_parts + parts_per_item - 1) / parts_per_item);
    for (int row = 0; row < num_rows; row++) {
        for (int64_t head = 0; head < shape->num_heads; head++) {
            merge_chunks(decoder, layer, row, head);
        }
    }
    apply(decoder, &layer->o, decoder->mixed, (int)num_rows, decoder->x);
    for (int64_t i = 0; i < num_rows * hidden; i++) decoder->h[i] += decoder->x[i];
}

void decoder_feed_forward(Decoder *decoder, const Layer *layer, const int *rows, int num_rows,
                          float *similarities) {
    int64_t hidden = decoder->shape.hidden;
    for (int i = 0; i < num_rows; i++) {
        rms_norm(decoder, decoder->h + rows[i] * hidden, layer->norm2, hidden,
                 decoder->x + i * hidden);
    }
    gate_up(decoder, &layer->gate_up, num_rows);
    apply(decoder, &layer->down, decoder->act, num_rows, decoder->x);
    for (int i = 0; i < num_rows; i++) {
        float *h = decoder->h + rows[i] * hidden, *after = decoder->x + i * hidden;
        for (int64_t k = 0; k < hidden; k++) after[k] += h[k];
        if (similarities != NULL) {
            float before_after = decoder->simd->dot(h, after, hidden);
            float lengths = sqrtf(decoder->simd->dot(h, h, hidden)) *
                            sqrtf(decoder->simd->dot(after, after, hidden));
            similarities[i] = before_after / lengths;
        }
        memcpy(h, after, (size_t)hidden * sizeof(float));
    }
}

void decoder_head(Decoder *decoder, const float *norm, const Linear *head, const int *rows,
                  int num_rows, float *logits) {
    int64_t hidden = decoder->shape.hidden;
    for (int i = 0; i < num_rows; i++) {
        rms_norm(decoder, decoder->h + rows[i] * hidden, norm, hidden, decoder->x + i * hidden);
    }
    apply(decoder, head, decoder->x, num_rows, logits);
}
