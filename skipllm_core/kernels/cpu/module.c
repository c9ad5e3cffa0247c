/* `skipllm_core.kernels.cpu._decoder`: decoder.h for Python. Tensors come as addresses; whoever
 * calls keeps them alive and has checked their shapes (skipllm_core/kernels/cpu/__init__.py). */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stddef.h>

#include "decoder.h"

typedef struct {
    PyObject_HEAD
    Shape shape;
    Decoder *decoder;
    const float *embedding, *norm;
    Linear head;
    Layer *layers;
    int num_layers, num_rows;
    long long num_blocks;
    int64_t *token_ids, *positions;
    int *rows;
    float *similarities;
    float (*thresholds)[2];
    _Atomic int64_t *left_out; /* [2, max_rows] */
} DecoderObject;

typedef unsigned long long Address;

/* A linear as Python gives it: (weight, scale or 0, bias or 0, num_outputs, num_inputs). */
static int to_linear(PyObject *object, void *to) {
    Address weight, scale, bias;
    long long num_outputs, num_inputs;
    if (!PyArg_ParseTuple(object, "KKKLL", &weight, &scale, &bias, &num_outputs, &num_inputs)) {
        return 0;
    }
    *(Linear *)to = (Linear){(const void *)(uintptr_t)weight, (const float *)(uintptr_t)scale,
                             (const float *)(uintptr_t)bias, num_outputs, num_inputs};
    return 1;
}

static int to_address(PyObject *object, void *to) {
    Address address = PyLong_AsUnsignedLongLong(object);
    if (PyErr_Occurred()) return 0;
    *(const float **)to = (const float *)(uintptr_t)address;
    return 1;
}

static void decoder_dealloc(DecoderObject *self) {
    if (self->decoder != NULL) decoder_free(self->decoder);
    PyMem_Free(self->layers);
    PyMem_Free(self->token_ids);
    PyMem_Free(self->positions);
    PyMem_Free(self->rows);
    PyMem_Free(self->similarities);
    PyMem_Free(self->thresholds);
    PyMem_Free((void *)self->left_out);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static int decoder_init(DecoderObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"hidden", "inner", "num_heads", "num_kv_heads", "head_dim", "block_size",
                            "num_blocks", "max_blocks", "max_rows", "num_layers", "num_threads",
                            "eps", "cos", "sin", "embedding", "norm", "head", NULL};
    Shape *shape = &self->shape;
    const float *cos, *sin;
    int num_layers, num_threads;
    long long hidden, inner, num_heads, num_kv_heads, head_dim, block_size, max_blocks, max_rows;
    if (self->decoder != NULL) {
        PyErr_SetString(PyExc_RuntimeError, "a decoder is made once");
        return -1;
    }
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$LLLLLLLLLiifO&O&O&O&O&", names, &hidden, &inner,
                                     &num_heads, &num_kv_heads, &head_dim, &block_size,
                                     &self->num_blocks, &max_blocks, &max_rows, &num_layers,
                                     &num_threads, &shape->eps, to_address, &cos, to_address, &sin,
                                     to_address, &self->embedding, to_address, &self->norm,
                                     to_linear, &self->head)) {
        return -1;
    }
    *shape = (Shape){hidden, inner, num_heads, num_kv_heads, head_dim, block_size, max_blocks,
                     max_rows, shape->eps};
    self->layers = PyMem_Calloc((size_t)num_layers, sizeof(Layer));
    self->token_ids = PyMem_Calloc((size_t)max_rows, sizeof(int64_t));
    self->positions = PyMem_Calloc((size_t)max_rows, sizeof(int64_t));
    self->rows = PyMem_Calloc((size_t)max_rows, sizeof(int));
    self->similarities = PyMem_Calloc((size_t)max_rows, sizeof(float));
    self->thresholds = PyMem_Calloc((size_t)max_rows, sizeof(*self->thresholds));
    self->left_out = PyMem_Calloc((size_t)(2 * max_rows), sizeof(*self->left_out));
    self->num_layers = num_layers;
    self->decoder = decoder_new(shape, cos, sin, num_threads);
    if (self->decoder == NULL || self->layers == NULL || self->token_ids == NULL ||
        self->positions == NULL || self->rows == NULL || self->similarities == NULL ||
        self->thresholds == NULL || self->left_out == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    return 0;
}

static PyObject *set_layer(DecoderObject *self, PyObject *args, PyObject *kwargs) {
    static char *names[] = {"layer", "norm1", "norm2", "qk_norm", "qkv", "o", "gate_up", "down",
                            "down_norms", "keys", "values", "window", NULL};
    Layer layer;
    int index;
    long long window;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "$iO&O&O&O&O&O&O&O&O&O&L", names, &index, to_address,
                                     &layer.norm1, to_address, &layer.norm2, to_address,
                                     &layer.qk_norm, to_linear, &layer.qkv, to_linear, &layer.o,
                                     to_linear, &layer.gate_up, to_linear, &layer.down, to_address,
                                     &layer.down_norms, to_address, &layer.keys, to_address,
                                     &layer.values, &window)) {
        return NULL;
    }
    layer.window = window;
    if (index < 0 || index >= self->num_layers) {
        PyErr_SetString(PyExc_IndexError, "no such layer");
        return NULL;
    }
    self->layers[index] = layer;
    Py_RETURN_NONE;
}

/* begin(token_ids, positions, block_tables): lists of one entry per row. */
static PyObject *begin(DecoderObject *self, PyObject *const *args, Py_ssize_t num_args) {
    if (num_args != 3 || !PyList_Check(args[0]) || !PyList_Check(args[1]) || !PyList_Check(args[2])) {
        PyErr_SetString(PyExc_TypeError, "begin takes three lists");
        return NULL;
    }
    Py_ssize_t num_rows = PyList_GET_SIZE(args[0]);
    if (num_rows < 1 || num_rows > self->shape.max_rows || num_rows != PyList_GET_SIZE(args[1]) ||
        num_rows != PyList_GET_SIZE(args[2])) {
        PyErr_SetString(PyExc_ValueError, "no rows, too many, or lists of different lengths");
        return NULL;
    }
    int32_t *table = decoder_block_tables(self->decoder);
    for (Py_ssize_t row = 0; row < num_rows; row++, table += self->shape.max_blocks) {
        self->token_ids[row] = PyLong_AsLongLong(PyList_GET_ITEM(args[0], row));
        self->positions[row] = PyLong_AsLongLong(PyList_GET_ITEM(args[1], row));
        PyObject *blocks = PyList_GET_ITEM(args[2], row);
        if (PyErr_Occurred()) return NULL;
        if (self->token_ids[row] < 0 || self->token_ids[row] >= self->head.num_outputs) {
            PyErr_SetString(PyExc_ValueError, "a token that is not in the vocabulary");
            return NULL;
        }
        if (!PyList_Check(blocks) || PyList_GET_SIZE(blocks) > self->shape.max_blocks ||
            self->positions[row] < 0 ||
            self->positions[row] >= PyList_GET_SIZE(blocks) * self->shape.block_size) {
            PyErr_SetString(PyExc_ValueError, "a block table that does not fit its position");
            return NULL;
        }
        for (Py_ssize_t i = 0; i < PyList_GET_SIZE(blocks); i++) {
            long block = PyLong_AsLong(PyList_GET_ITEM(blocks, i));
            if (block < 0 || block >= self->num_blocks) {
                if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "no such block");
                return NULL;
            }
            table[i] = (int32_t)block;
        }
    }
    self->num_rows = (int)num_rows;
    decoder_begin(self->decoder, self->embedding, self->num_rows, self->token_ids, self->positions);
    Py_RETURN_NONE;
}

static const Layer *layer_of(DecoderObject *self, PyObject *index) {
    long layer = PyLong_AsLong(index);
    if (PyErr_Occurred()) return NULL;
    if (layer < 0 || layer >= self->num_layers) {
        PyErr_SetString(PyExc_IndexError, "no such layer");
        return NULL;
    }
    return &self->layers[layer];
}

static PyObject *attend(DecoderObject *self, PyObject *index) {
    const Layer *layer = layer_of(self, index);
    if (layer == NULL) return NULL;
    Py_BEGIN_ALLOW_THREADS
    decoder_attend(self->decoder, layer);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* Leaves `rows` (None: all of the step's) in self->rows; returns their number, -1: error. */
static int take_rows(DecoderObject *self, PyObject *rows) {
    if (rows == Py_None) {
        for (int i = 0; i < self->num_rows; i++) self->rows[i] = i;
        return self->num_rows;
    }
    if (!PyList_Check(rows) || PyList_GET_SIZE(rows) > self->num_rows) {
        PyErr_SetString(PyExc_TypeError, "rows is None or a list of some of the rows");
        return -1;
    }
    int num_rows = (int)PyList_GET_SIZE(rows);
    for (int i = 0; i < num_rows; i++) {
        long row = PyLong_AsLong(PyList_GET_ITEM(rows, i));
        if (row < 0 || row >= self->num_rows) {
            if (!PyErr_Occurred()) PyErr_SetString(PyExc_IndexError, "no such row");
            return -1;
        }
        self->rows[i] = (int)row;
    }
    return num_rows;
}

/* The FFN for `rows`; returns their number, -1: error. */
static int run_feed_forward(DecoderObject *self, PyObject *const *args, Py_ssize_t num_args,
                            float *similarities, Neurons *neurons) {
    if (num_args != 2) {
        PyErr_SetString(PyExc_TypeError, "feed_forward takes a layer and rows");
        return -1;
    }
    const Layer *layer = layer_of(self, args[0]);
    int num_rows = layer == NULL ? -1 : take_rows(self, args[1]);
    if (num_rows < 0) return -1;
    Py_BEGIN_ALLOW_THREADS
    decoder_feed_forward(self->decoder, layer, self->rows, num_rows, similarities, neurons);
    Py_END_ALLOW_THREADS
    return num_rows;
}

/* feed_forward(layer, rows) */
static PyObject *feed_forward(DecoderObject *self, PyObject *const *args, Py_ssize_t num_args) {
    if (run_feed_forward(self, args, num_args, NULL, NULL) < 0) return NULL;
    Py_RETURN_NONE;
}

/* The similarities of all rows of the step, of which num_run ran. */
static PyObject *similarities_of_all(DecoderObject *self, int num_run) {
    PyObject *result = PyList_New(self->num_rows);
    if (result == NULL) return NULL;
    for (int row = 0, i = 0; row < self->num_rows; row++) {
        int ran = i < num_run && self->rows[i] == row;
        PyObject *similarity = PyFloat_FromDouble(ran ? self->similarities[i++] : 1.0);
        if (similarity == NULL) {
            Py_DECREF(result);
            return NULL;
        }
        PyList_SET_ITEM(result, row, similarity);
    }
    return result;
}

/* feed_forward_watched(layer, rows): the similarities of all rows of the step, as a list. */
static PyObject *feed_forward_watched(DecoderObject *self, PyObject *const *args,
                                      Py_ssize_t num_args) {
    int num_run = run_feed_forward(self, args, num_args, self->similarities, NULL);
    return num_run < 0 ? NULL : similarities_of_all(self, num_run);
}

/* Fills self->thresholds with those of the rows in self->rows; -1: error. */
static int take_thresholds(DecoderObject *self, PyObject *thresholds, int num_rows) {
    if (!PyList_Check(thresholds) || PyList_GET_SIZE(thresholds) != self->num_rows) {
        PyErr_SetString(PyExc_TypeError, "thresholds are a list, of all rows");
        return -1;
    }
    for (int i = 0; i < num_rows; i++) {
        float *pair = self->thresholds[i];
        PyObject *of_row = PyList_GET_ITEM(thresholds, self->rows[i]);
        if (!PyTuple_Check(of_row)) {
            PyErr_SetString(PyExc_TypeError, "a row's thresholds are a pair");
            return -1;
        }
        if (!PyArg_ParseTuple(of_row, "ff", &pair[0], &pair[1])) return -1;
    }
    return 0;
}

/* What the rows that ran left out, by row of the step. */
static PyObject *left_out_by_row(DecoderObject *self, const _Atomic int64_t *counts, int num_run) {
    PyObject *result = PyList_New(self->num_rows);
    if (result == NULL) return NULL;
    for (int row = 0, i = 0; row < self->num_rows; row++) {
        int ran = i < num_run && self->rows[i] == row;
        PyObject *count = PyLong_FromLongLong(ran ? (long long)counts[i++] : 0);
        if (count == NULL) {
            Py_DECREF(result);
            return NULL;
        }
        PyList_SET_ITEM(result, row, count);
    }
    return result;
}

/* feed_forward_neurons(layer, rows, thresholds, is_joint, is_watched): (before_up, before_down,
 * unread_up, unread_down, similarities or None) */
static PyObject *feed_forward_neurons(DecoderObject *self, PyObject *const *args,
                                      Py_ssize_t num_args) {
    if (num_args != 5) {
        PyErr_SetString(PyExc_TypeError, "feed_forward_neurons takes five arguments");
        return NULL;
    }
    int num_rows = take_rows(self, args[1]);
    if (num_rows < 0 || take_thresholds(self, args[2], num_rows) < 0) return NULL;
    int is_joint = PyObject_IsTrue(args[3]), is_watched = PyObject_IsTrue(args[4]);
    if (is_joint < 0 || is_watched < 0) return NULL;
    _Atomic int64_t *before_up = self->left_out, *before_down = before_up + self->shape.max_rows;
    for (int i = 0; i < num_rows; i++) before_up[i] = before_down[i] = 0;
    Neurons neurons = {.thresholds = (const float (*)[2])self->thresholds, .is_joint = is_joint,
                       .left_out = {before_up, before_down}};
    float *similarities = is_watched ? self->similarities : NULL;
    int num_run = run_feed_forward(self, args, 2, similarities, &neurons);
    if (num_run < 0) return NULL;
    PyObject *seen = is_watched ? similarities_of_all(self, num_run) : Py_NewRef(Py_None);
    return Py_BuildValue("NNLLN", left_out_by_row(self, before_up, num_run),
                         left_out_by_row(self, before_down, num_run),
                         (long long)neurons.unread[0], (long long)neurons.unread[1], seen);
}

/* head(rows, logits): the address of [number of rows, vocabulary] floats to write. */
static PyObject *head(DecoderObject *self, PyObject *const *args, Py_ssize_t num_args) {
    if (num_args != 2) {
        PyErr_SetString(PyExc_TypeError, "head takes rows and an address");
        return NULL;
    }
    void *logits = PyLong_AsVoidPtr(args[1]);
    int num_rows = PyErr_Occurred() ? -1 : take_rows(self, args[0]);
    if (num_rows < 0) return NULL;
    Py_BEGIN_ALLOW_THREADS
    decoder_head(self->decoder, self->norm, &self->head, self->rows, num_rows, (float *)logits);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *instructions(DecoderObject *self, void *closure) {
    (void)closure;
    return PyUnicode_FromString(decoder_simd(self->decoder));
}

#define METHOD(function) ((PyCFunction)(void (*)(void))(function))

static PyMethodDef methods[] = {
    {"set_layer", METHOD(set_layer), METH_VARARGS | METH_KEYWORDS, NULL},
    {"begin", METHOD(begin), METH_FASTCALL, NULL},
    {"attend", METHOD(attend), METH_O, NULL},
    {"feed_forward", METHOD(feed_forward), METH_FASTCALL, NULL},
    {"feed_forward_watched", METHOD(feed_forward_watched), METH_FASTCALL, NULL},
    {"feed_forward_neurons", METHOD(feed_forward_neurons), METH_FASTCALL, NULL},
    {"head", METHOD(head), METH_FASTCALL, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef getters[] = {
    {"instructions", (getter)instructions, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyTypeObject DecoderType = {
    PyVarObject_HEAD_INIT(NULL, 0)
    .tp_name = "skipllm_core.kernels.cpu._decoder.Decoder",
    .tp_basicsize = sizeof(DecoderObject),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)decoder_init,
    .tp_dealloc = (destructor)decoder_dealloc,
    .tp_methods = methods,
    .tp_getset = getters,
};

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, .m_name = "_decoder", .m_size = -1,
};

PyMODINIT_FUNC PyInit__decoder(void) {
    PyObject *self = PyModule_Create(&module);
    if (self == NULL || PyModule_AddType(self, &DecoderType) < 0) {
        Py_XDECREF(self);
        return NULL;
    }
    return self;
}
