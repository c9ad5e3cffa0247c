#include "linears.h"

#include <stddef.h>

/* Bytes of weights in an item: few, so that the last one is soon done. A thread's items are neighbours,
 * so it reads long runs all the same. */
#define MIN_ITEM_BYTES 16384
#define MAX_ITEM_BYTES 32768
#define ITEMS_PER_THREAD 16

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

Input input_of(const Workers *workers, const Linear *linear, const float *x, int num_rows) {
    int64_t n = linear->num_inputs;
    if (linear->scale != NULL) {
        for (int row = 0; row < num_rows; row++) {
            workers->scales[row] =
                workers->simd->quantize(x + row * n, n, workers->quantized + row * n);
        }
    }
    return (Input){x, workers->quantized, workers->scales, n, num_rows};
}

int64_t outputs_per_item(const Pool *pool, int64_t num_outputs, int64_t bytes) {
    int64_t fair = num_outputs * bytes / (ITEMS_PER_THREAD * pool_num_threads(pool));
    int64_t item_bytes = larger(MIN_ITEM_BYTES, smaller(MAX_ITEM_BYTES, fair));
    int64_t outputs = larger(item_bytes / bytes, num_outputs / POOL_MAX_ITEMS + 1);
    return (outputs + 3) / 4 * 4;
}

int64_t most_outputs_per_item(int64_t num_inputs, int64_t num_outputs) {
    return MAX_ITEM_BYTES / num_inputs + num_outputs / POOL_MAX_ITEMS + 8;
}

int64_t weight_bytes(const Linear *linear) { return linear->scale == NULL ? 4 : 1; }

typedef struct {
    const Workers *workers;
    const Linear *linear;
    Input input;
    int64_t outputs_per_item;
    float *out;
} LinearTask;

static void linear_item(void *context, int64_t item, int thread) {
    (void)thread;
    LinearTask *task = context;
    int64_t first = item * task->outputs_per_item;
    int64_t end = smaller(first + task->outputs_per_item, task->linear->num_outputs);
    task->workers->simd->linear(task->linear, &task->input, first, end, task->out + first,
                                task->linear->num_outputs);
}

void linear_apply(const Workers *workers, const Linear *linear, const float *x, int num_rows,
                  float *out) {
    int64_t bytes = linear->num_inputs * weight_bytes(linear);
    LinearTask task = {workers, linear, input_of(workers, linear, x, num_rows),
                       outputs_per_item(workers->pool, linear->num_outputs, bytes), out};
    int64_t num_items = (linear->num_outputs + task.outputs_per_item - 1) / task.outputs_per_item;
    pool_run(workers->pool, linear_item, &task, num_items);
}
