/* Which neurons rows leave out of a layer: the rule is that of skipllm_core/skip/neurons.py. */
#ifndef SKIPLLM_NEURONS_H
#define SKIPLLM_NEURONS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* What rows ask for, and what came of it. */
typedef struct {
    const float *norms;          /* [inner]: of the columns of down */
    const float (*thresholds)[2]; /* [num_rows]: before up and before down; 0 leaves nothing out */
    bool is_joint;               /* rows with a threshold leave out the same neurons */
    /* [num_rows] each, 0 at first: before up, and of the others before down. */
    _Atomic int64_t *left_out[2];
    int64_t unread[2]; /* rows of up's weights and of down's that no row wanted */
} Neurons;

/* Makes gone[i] -1 for those of the n neurons that go together, and returns how many: as many as
 * `total`, what the rows would leave out by themselves, makes on average over num_rows, rounded
 * down, of those that have not gone yet, with the lowest sum of squared scores. What is no number
 * stays. keys: scratch [n]. */
int64_t choose_together(const float *sums, int32_t *gone, int64_t n, int64_t total, int num_rows,
                        uint32_t *keys);

#endif
