#include "memory.h"

#include <assert.h>
#include <stdlib.h>

#define LINE 64

void *memory_zeros(Memory *memory, int64_t num, size_t bytes) {
    assert(memory->num < MAX_BUFFERS);
    char *buffer = calloc((size_t)num * bytes + LINE, 1);
    if (buffer == NULL) {
        memory->is_short = true;
        return NULL;
    }
    memory->buffers[memory->num++] = buffer;
    return buffer + (LINE - (uintptr_t)buffer % LINE) % LINE;
}

void memory_free(Memory *memory) {
    for (int i = 0; i < memory->num; i++) free(memory->buffers[i]);
}
