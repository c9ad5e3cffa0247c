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
 *
 * Where rows leave neurons out, the first loop is two: the gates of all neurons, then up of those
 * that some row wants; and the others go through lists of them. What a row leaves out is 0 in act,
 * and a 0 is not multiplied: so a row's sums are those of its own neurons, whatever others want.
 */
#include "feed_forward.h"

#include "memory.h"

#include <math.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define NUM_SEGMENTS 64
#define MIN_SEGMENT 32 /* neurons */
#define NUM_GROUPS 8

struct FeedForward {
    Memory memory;
    int64_t hidden, inner, max_rows;
    int64_t segment; /* neurons of one */
    int64_t num_segments, group;    /* segments of one */
    float *act;                     /* [max_rows, inner] */
    float *up;                      /* [num_threads, max_rows, item_outputs_max] */
    int64_t item_outputs_max;
    int32_t *sums;                  /* [num_segments, num_rows, hidden], float or int32_t */
    int32_t *own;                   /* [num_threads, num_rows, hidden]: of the segment at hand */
    _Atomic int64_t *num_added;     /* [groups]: segments in the group's sum, its first segment's */
    /* For neurons left out, [inner] each: */
    int32_t *wanted;   /* -1 where some row wants it */
    int32_t *listed;   /* the ascending list of those that are wanted */
    int32_t *gone;     /* -1 where the rows that choose together are without it */
    float *together;   /* sum over these rows of the squared score */
    uint32_t *keys;
    int32_t *segment_starts; /* [num_segments + 1], in the list */
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
    int64_t size = max_rows * hidden, num_groups = parts_of(ffn->num_segments, ffn->group);
    Memory *memory = &ffn->memory;
    ffn->act = memory_zeros(memory, max_rows * inner, sizeof(float));
    ffn->up = memory_zeros(memory, num_threads * max_rows * ffn->item_outputs_max, sizeof(float));
    ffn->sums = memory_zeros(memory, ffn->num_segments * size, sizeof(int32_t));
    ffn->own = memory_zeros(memory, num_threads * size, sizeof(int32_t));
    ffn->num_added = memory_zeros(memory, num_groups, sizeof(*ffn->num_added));
    ffn->wanted = memory_zeros(memory, inner, sizeof(int32_t));
    ffn->listed = memory_zeros(memory, inner + 1, sizeof(int32_t)); /* written one too far */
    ffn->gone = memory_zeros(memory, inner, sizeof(int32_t));
    ffn->together = memory_zeros(memory, inner, sizeof(float));
    ffn->keys = memory_zeros(memory, inner + 1, sizeof(uint32_t)); /* so are they */
    ffn->segment_starts = memory_zeros(memory, ffn->num_segments + 1, sizeof(int32_t));
    if (!memory->is_short) return ffn;
    feed_forward_free(ffn);
    return NULL;
}

void feed_forward_free(FeedForward *ffn) {
    memory_free(&ffn->memory);
    free(ffn);
}

typedef struct {
    FeedForward *ffn;
    const Workers *workers;
    const Linear *gate_up, *down;
    Input input;
    int64_t outputs_per_item;
    Neurons *neurons; /* NULL: the rows want them all */
    Some some;        /* the neurons that are wanted */
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
    int64_t end = smaller(first + ffn->segment, ffn->inner);
    if (task->neurons != NULL) {
        first = ffn->segment_starts[segment];
        end = ffn->segment_starts[segment + 1];
    }
    task->workers->simd->linear_part(task->down, &task->input, &task->some, first, end,
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

/* With neurons left out ------------------------------------------------------------------------*/

static bool has_rule(const Neurons *neurons, int row) {
    return neurons->thresholds[row][0] > 0 || neurons->thresholds[row][1] > 0;
}

/* A row's value of a neuron, scored before up (stage 0) or before down (1), for a choice that the
 * rows make together. Returns whether the row itself would leave it out. */
static bool score(const Task *task, int row, int stage, int64_t neuron, float value) {
    float found = fabsf(value) * task->neurons->norms[neuron];
    task->ffn->together[neuron] += found * found;
    return found < task->neurons->thresholds[row][stage];
}

static void gate_item(void *context, int64_t item, int thread) {
    (void)thread;
    Task *task = context;
    FeedForward *ffn = task->ffn;
    Neurons *neurons = task->neurons;
    const Simd *simd = task->workers->simd;
    int64_t first = item * task->outputs_per_item;
    int64_t n = smaller(task->outputs_per_item, ffn->inner - first);
    int32_t *wanted = ffn->wanted + first;
    memset(wanted, 0, (size_t)n * sizeof(int32_t));
    memset(ffn->together + first, 0, (size_t)n * sizeof(float));
    simd->linear(task->gate_up, &task->input, first, first + n, ffn->act + first, ffn->inner);
    for (int row = 0; row < task->input.num_rows; row++) {
        float *act = ffn->act + row * ffn->inner + first;
        int64_t num_below = 0;
        simd->silu(act, n);
        if (neurons->is_joint && has_rule(neurons, row)) {
            for (int64_t i = 0; i < n; i++) num_below += score(task, row, 0, first + i, act[i]);
        } else {
            float threshold = neurons->thresholds[row][0];
            num_below = simd->leave_out(act, neurons->norms + first, threshold, wanted, n);
        }
        atomic_fetch_add(&neurons->left_out[0][row], num_below);
    }
}

/* silu(gate) * up of the neurons that are wanted, where the row has not left them out. */
static void up_item(void *context, int64_t item, int thread) {
    Task *task = context;
    FeedForward *ffn = task->ffn;
    Neurons *neurons = task->neurons;
    int64_t first = item * task->outputs_per_item, stride = ffn->item_outputs_max;
    int64_t n = smaller(task->outputs_per_item, task->some.num - first);
    float *up = ffn->up + thread * ffn->max_rows * stride;
    const int32_t *ids = task->some.ids + first;
    Some outputs = task->some;
    outputs.offset = ffn->inner;
    task->workers->simd->linear_some(task->gate_up, &task->input, &outputs, first, first + n, up,
                                     stride);
    for (int row = 0; row < task->input.num_rows; row++) {
        bool is_joint = neurons->is_joint && has_rule(neurons, row);
        const float *thresholds = neurons->thresholds[row];
        float *act = ffn->act + row * ffn->inner;
        int64_t num_below = 0;
        for (int64_t i = 0; i < n; i++) {
            int32_t id = ids[i];
            /* What is 0 was below the first threshold, if there is one. */
            bool is_out = is_joint ? ffn->gone[id] != 0 : thresholds[0] > 0 && act[id] == 0;
            if (is_out) continue;
            float value = act[id] * up[row * stride + i];
            if (is_joint) {
                num_below += score(task, row, 1, id, value);
            } else {
                bool is_below = fabsf(value) * neurons->norms[id] < thresholds[1];
                if (is_below) value = 0;
                else ffn->wanted[id] = -1;
                num_below += is_below;
            }
            act[id] = value;
        }
        atomic_fetch_add(&neurons->left_out[1][row], num_below);
    }
}

/* What the rows with a threshold leave out together before up (stage 0) or before down (1). */
static void leave_out_together(Task *task, int stage) {
    FeedForward *ffn = task->ffn;
    Neurons *neurons = task->neurons;
    int num_choosing = 0;
    int64_t total = 0; /* what they would leave out by themselves */
    for (int row = 0; row < task->input.num_rows; row++) {
        if (!has_rule(neurons, row)) continue;
        num_choosing++;
        total += neurons->left_out[stage][row];
    }
    int64_t num_left_out = choose_together(ffn->together, ffn->gone, ffn->inner, total,
                                           num_choosing, ffn->keys);
    for (int64_t i = 0; i < ffn->inner; i++) ffn->wanted[i] |= ~ffn->gone[i];
    for (int row = 0; row < task->input.num_rows; row++) {
        if (!has_rule(neurons, row)) continue;
        int32_t *act = (int32_t *)(ffn->act + row * ffn->inner);
        for (int64_t i = 0; i < ffn->inner; i++) act[i] &= ~ffn->gone[i];
        neurons->left_out[stage][row] = num_left_out;
    }
}

/* Lists what is wanted. */
static void list_wanted(Task *task, int stage) {
    FeedForward *ffn = task->ffn;
    int64_t num = 0;
    for (int64_t segment = 0; segment < ffn->num_segments; segment++) {
        int64_t first = segment * ffn->segment, end = smaller(first + ffn->segment, ffn->inner);
        ffn->segment_starts[segment] = (int32_t)num;
        for (int64_t i = first; i < end; i++) {
            ffn->listed[num] = (int32_t)i;
            num += ffn->wanted[i] != 0;
        }
    }
    ffn->segment_starts[ffn->num_segments] = (int32_t)num;
    task->some = (Some){ffn->listed, num, 0};
    task->neurons->unread[stage] = ffn->inner - num;
}

static void gate_up_wanted(Task *task) {
    FeedForward *ffn = task->ffn;
    Pool *pool = task->workers->pool;
    int64_t bytes = ffn->hidden * weight_bytes(task->gate_up);
    task->outputs_per_item = outputs_per_item(pool, ffn->inner, bytes);
    memset(ffn->gone, 0, (size_t)ffn->inner * sizeof(int32_t));
    pool_run(pool, gate_item, task, parts_of(ffn->inner, task->outputs_per_item));
    if (task->neurons->is_joint) leave_out_together(task, 0);
    list_wanted(task, 0);
    task->outputs_per_item = outputs_per_item(pool, task->some.num, bytes);
    memset(ffn->wanted, 0, (size_t)ffn->inner * sizeof(int32_t));
    memset(ffn->together, 0, (size_t)ffn->inner * sizeof(float));
    pool_run(pool, up_item, task, parts_of(task->some.num, task->outputs_per_item));
    if (task->neurons->is_joint) leave_out_together(task, 1);
    list_wanted(task, 1);
}

/* The whole -------------------------------------------------------------------------------------*/

void feed_forward_run(FeedForward *ffn, const Workers *workers, const Linear *gate_up,
                      const Linear *down, const float *x, int num_rows, float *h, const int *rows,
                      float *similarities, Neurons *neurons) {
    Task task = {.ffn = ffn, .workers = workers, .gate_up = gate_up, .down = down, .h = h,
                 .rows = rows, .similarities = similarities, .neurons = neurons};
    task.input = input_of(workers, gate_up, x, num_rows);
    if (neurons != NULL) {
        gate_up_wanted(&task);
    } else {
        task.outputs_per_item = outputs_per_item(workers->pool, ffn->inner,
                                                 2 * ffn->hidden * weight_bytes(gate_up));
        task.some = (Some){NULL, ffn->inner, 0};
        pool_run(workers->pool, gate_up_item, &task, parts_of(ffn->inner, task.outputs_per_item));
    }
    task.input = input_of(workers, down, ffn->act, num_rows);
    for (int64_t group = 0; group * ffn->group < ffn->num_segments; group++) ffn->num_added[group] = 0;
    pool_run(workers->pool, down_item, &task, ffn->num_segments);
    pool_run(workers->pool, row_item, &task, num_rows);
}
