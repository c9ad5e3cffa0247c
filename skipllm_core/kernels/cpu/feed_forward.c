/* Two loops over the neurons and one over the rows:
 *
 *     gate and up    act = silu(gate) * up                   items of a few neurons
 *     down           segments of neurons, each a sum of its own [num_rows, hidden]
 *     the rows       the segments' sums are added up, and to the residual
 *
 * The order of the sums is fixed by the shape alone: neurons of a segment one after the other, then
 * the segments of a group, then the groups. To keep the sums of all segments until the end would
 * cost as much memory traffic as many a weight; so whoever has computed the next segment of a group
 * adds it to the group's sum, which is still in his cache, and only what comes out of turn is kept.
 */
#include "feed_forward.h"

#include <math.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define NUM_SEGMENTS 64
#define MIN_SEGMENT 32 /* neurons */
#define NUM_GROUPS 8

struct FeedForward {
    int64_t hidden, inner, max_rows;
    int64_t segment; /* neurons of one */
    int64_t num_segments, group;    /* segments of one */
    float *act;                     /* [max_rows, inner] */
    float *up;                      /* [num_threads, max_rows, item_outputs_max] */
    int64_t item_outputs_max;
    int32_t *sums;                  /* [num_segments, num_rows, hidden], float or int32_t */
    int32_t *own;                   /* [num_threads, num_rows, hidden]: of the segment at hand */
    _Atomic int64_t *num_added;     /* [groups]: segments in the group's sum, its first segment's */
};

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t parts_of(int64_t all, int64_t part) { return (all + part - 1) / part; }

FeedForward *feed_forward_new(int64_t hidden, int64_t inner, int64_t max_rows, int num_threads) {
    FeedForward *ffn = calloc(1, sizeof(FeedForward));
    if (ffn == NULL) return NULL;
    int64_t segment = larger(MIN_SEGMENT, parts_of(parts_of(inner, NUM_SEGMENTS), 8) * 8);
    ffn->hidden = hidden;
    ffn->inner = inner;
    ffn->max_rows = max_rows;
    ffn->segment = smaller(segment, INT8_SUM_MAX);
    ffn->num_segments = parts_of(inner, ffn->segment);
    /* The integers of a group's sum fit 32 bits. */
    ffn->group = smaller(parts_of(ffn->num_segments, NUM_GROUPS), INT8_SUM_MAX / ffn->segment);
    ffn->item_outputs_max = most_outputs_per_item(hidden, inner);
    int64_t size = max_rows * hidden;
    ffn->act = calloc((size_t)(max_rows * inner), sizeof(float));
    ffn->up = calloc((size_t)(num_threads * max_rows * ffn->item_outputs_max), sizeof(float));
    ffn->sums = calloc((size_t)(ffn->num_segments * size), sizeof(int32_t));
    ffn->own = calloc((size_t)(num_threads * size), sizeof(int32_t));
    ffn->num_added =
        calloc((size_t)parts_of(ffn->num_segments, ffn->group), sizeof(*ffn->num_added));
    if (ffn->act != NULL && ffn->up != NULL && ffn->sums != NULL && ffn->own != NULL &&
        ffn->num_added != NULL) {
        return ffn;
    }
    feed_forward_free(ffn);
    return NULL;
}

void feed_forward_free(FeedForward *ffn) {
    free(ffn->act);
    free(ffn->up);
    free(ffn->sums);
    free(ffn->own);
    free((void *)ffn->num_added);
    free(ffn);
}

typedef struct {
    FeedForward *ffn;
    const Workers *workers;
    const Linear *gate_up, *down;
    Input input;
    int64_t outputs_per_item;
    float *h;
    const int *rows;
    float *similarities;
} Task;

/* Gate and up of the same neurons in one item, and silu(gate) * up while both are at hand. */
static void gate_up_item(void *context, int64_t item, int thread) {
    Task *task = context;
    FeedForward *ffn = task->ffn;
    const Simd *simd = task->workers->simd;
    int64_t inner = ffn->inner, stride = ffn->item_outputs_max;
    int64_t first = item * task->outputs_per_item;
    int64_t end = smaller(first + task->outputs_per_item, inner);
    float *up = ffn->up + thread * ffn->max_rows * stride;
    simd->linear(task->gate_up, &task->input, first, end, ffn->act + first, inner);
    simd->linear(task->gate_up, &task->input, inner + first, inner + end, up, stride);
    for (int row = 0; row < task->input.num_rows; row++) {
        simd->silu_mul(ffn->act + row * inner + first, up + row * stride, end - first);
    }
}

static void add(const Linear *linear, int32_t *to, const int32_t *from, int64_t n) {
    if (linear->scale != NULL) {
        for (int64_t i = 0; i < n; i++) to[i] += from[i];
    } else {
        float *sums = (float *)to;
        const float *more = (const float *)from;
        for (int64_t i = 0; i < n; i++) sums[i] += more[i];
    }
}

static void down_item(void *context, int64_t segment, int thread) {
    Task *task = context;
    FeedForward *ffn = task->ffn;
    int64_t first = segment * ffn->segment, size = task->input.num_rows * ffn->hidden;
    int64_t group = segment / ffn->group, head = group * ffn->group;
    int32_t *kept = ffn->sums + segment * size, *own = ffn->own + thread * ffn->max_rows * ffn->hidden;
    task->workers->simd->linear_part(task->down, &task->input, first,
                                     smaller(first + ffn->segment, ffn->inner),
                                     segment == head ? kept : own);
    if (segment == head) {
        atomic_store_explicit(&ffn->num_added[group], 1, memory_order_release);
    } else if (atomic_load_explicit(&ffn->num_added[group], memory_order_acquire) == segment - head) {
        add(task->down, ffn->sums + head * size, own, size);
        atomic_store_explicit(&ffn->num_added[group], segment - head + 1, memory_order_release);
    } else {
        memcpy(kept, own, (size_t)size * sizeof(int32_t));
    }
}

/* The cosine of x and y. */
static float similarity(const Simd *simd, const float *x, const float *y, int64_t n) {
    return simd->dot(x, y, n) / (sqrtf(simd->dot(x, x, n)) * sqrtf(simd->dot(y, y, n)));
}

/* out [hidden] = what the neurons give a row. */
static void sum_up(const Task *task, int64_t row, float *out) {
    FeedForward *ffn = task->ffn;
    const Linear *down = task->down;
    int64_t hidden = ffn->hidden, size = task->input.num_rows * hidden;
    memset(out, 0, (size_t)hidden * sizeof(float));
    for (int64_t head = 0; head < ffn->num_segments; head += ffn->group) {
        int32_t *sums = ffn->sums + head * size + row * hidden;
        int64_t end = smaller(head + ffn->group, ffn->num_segments);
        for (int64_t k = head + ffn->num_added[head / ffn->group]; k < end; k++) {
            add(down, sums, ffn->sums + k * size + row * hidden, hidden);
        }
        if (down->scale == NULL) add(down, (int32_t *)out, sums, hidden);
        else for (int64_t i = 0; i < hidden; i++) out[i] += (float)sums[i];
    }
    if (down->scale != NULL) {
        float scale = task->input.scales[row];
        for (int64_t i = 0; i < hidden; i++) out[i] *= down->scale[i] * scale;
    }
    if (down->bias != NULL) {
        for (int64_t i = 0; i < hidden; i++) out[i] += down->bias[i];
    }
}

static void row_item(void *context, int64_t row, int thread) {
    Task *task = context;
    int64_t hidden = task->ffn->hidden;
    float *h = task->h + task->rows[row] * hidden;
    float *after = (float *)task->ffn->own + thread * task->ffn->max_rows * hidden;
    sum_up(task, row, after);
    for (int64_t i = 0; i < hidden; i++) after[i] += h[i];
    if (task->similarities != NULL) {
        task->similarities[row] = similarity(task->workers->simd, h, after, hidden);
    }
    memcpy(h, after, (size_t)hidden * sizeof(float));
}

void feed_forward_run(FeedForward *ffn, const Workers *workers, const Linear *gate_up,
                      const Linear *down, const float *x, int num_rows, float *h, const int *rows,
                      float *similarities) {
    Task task = {.ffn = ffn, .workers = workers, .gate_up = gate_up, .down = down, .h = h,
                 .rows = rows, .similarities = similarities};
    task.input = input_of(workers, gate_up, x, num_rows);
    task.outputs_per_item = outputs_per_item(workers->pool, ffn->inner,
                                             2 * ffn->hidden * weight_bytes(gate_up));
    pool_run(workers->pool, gate_up_item, &task, parts_of(ffn->inner, task.outputs_per_item));
    task.input = input_of(workers, down, ffn->act, num_rows);
    for (int64_t group = 0; group * ffn->group < ffn->num_segments; group++) ffn->num_added[group] = 0;
    pool_run(workers->pool, down_item, &task, ffn->num_segments);
    pool_run(workers->pool, row_item, &task, num_rows);
}
