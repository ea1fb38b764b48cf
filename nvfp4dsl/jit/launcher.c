/* A call of a compiled W4A16 kernel, from torch tensors to the launch, as a builtin function of Python.
 *
 * The host's time is the point: tvm-ffi's own call converts seven arguments in 0.9 us, the interpreter takes as long to
 * see whether torch watches. Compiled by launcher.py, which fills in `plan`. Python's stable ABI is declared here rather
 * than included, so that a compiler is all it takes; tvm-ffi and DLPack come from the headers of apache-tvm-ffi. */
#include <dlpack/dlpack.h>
#include <stdint.h>
#include <tvm/ffi/c_api.h>

typedef struct _object PyObject;
typedef struct {
  const char* name;
  PyObject* (*function)(PyObject*, PyObject* const*, intptr_t);
  int flags;
  const char* doc;
} PyMethodDef;
#define METH_FASTCALL 0x80
extern PyObject _Py_NoneStruct, _Py_TrueStruct;
PyObject* PyCFunction_NewEx(PyMethodDef*, PyObject*, PyObject*);
PyObject* PyObject_Call(PyObject*, PyObject*, PyObject*);
PyObject* PyObject_CallNoArgs(PyObject*);
PyObject* PyObject_GetAttr(PyObject*, PyObject*);
PyObject* PyObject_Type(PyObject*);
int PyObject_RichCompareBool(PyObject*, PyObject*, int);
#define Py_EQ 2
void* PyLong_AsVoidPtr(PyObject*);
void Py_IncRef(PyObject*);
void Py_DecRef(PyObject*);
void PyErr_Clear(void);
void* PyEval_SaveThread(void);
void PyEval_RestoreThread(void*);

/* The kernel's arguments: x, codes, scales, alpha, bias, y, max_ctas. */
enum { X, CODES, SCALES, ALPHA, BIAS, Y, MAX_CTAS, ARGUMENTS };
#define MOST_WATCHES 8

typedef struct {
  PyObject* tensor_types[2];              /* what x and bias may be: exactly these, no subclass */
  PyObject* watches[MOST_WATCHES];        /* called without arguments, or asked for an attribute; NULL ends */
  PyObject* attributes[MOST_WATCHES];     /* its name, NULL for a call */
  PyObject* quiet[MOST_WATCHES];          /* what comes back if nothing stands in the way */
  PyObject *is_grad_enabled, *requires_grad; /* a function; the attribute's name */
  PyObject *empty, *empty_arguments;      /* allocates the output on the current device */
  PyObject* empty_elsewhere;              /* the same on x's device, which takes longer */
  PyObject* weights[3];                   /* codes, scales, alpha: addresses are read anew at each call */
  const DLPackExchangeAPI* torch;
  void* function;
  int (*call)(void*, const TVMFFIAny*, int32_t, TVMFFIAny*);
  int (*set_stream)(int32_t, int32_t, void*, void**);
  void (*move_error)(void**);
  int (*release)(void*);
  int64_t rows, k;
  DLTensor tensors[ARGUMENTS];            /* their shapes are x's and y's flattened to matrices */
  int64_t shapes[ARGUMENTS][4], strides[ARGUMENTS][4];
  int64_t max_ctas;
} plan;

static PyObject* long_way(void) {
  PyErr_Clear();
  Py_IncRef(&_Py_NoneStruct);
  return &_Py_NoneStruct;
}

static int is_plain(const plan* p, PyObject* t) {
  PyObject* type = PyObject_Type(t);
  Py_DecRef(type);
  return type == p->tensor_types[0] || type == p->tensor_types[1];
}

static int is_true(PyObject* value) {
  if (value) Py_DecRef(value);
  return value == &_Py_TrueStruct;
}

/* Whether gradients, modes, tracing or the like ask for the operator. */
static int is_watched(const plan* p, PyObject* x, PyObject* bias) {
  for (int i = 0; i < MOST_WATCHES && p->watches[i]; ++i) {
    PyObject* name = p->attributes[i];
    PyObject* value = name ? PyObject_GetAttr(p->watches[i], name) : PyObject_CallNoArgs(p->watches[i]);
    int quiet = value && (value == p->quiet[i] || PyObject_RichCompareBool(value, p->quiet[i], Py_EQ) == 1);
    if (value) Py_DecRef(value);
    if (!quiet) return 1;
  }
  if (!is_true(PyObject_CallNoArgs(p->is_grad_enabled))) return 0;
  return is_true(PyObject_GetAttr(x, p->requires_grad)) ||
         (bias != &_Py_NoneStruct && is_true(PyObject_GetAttr(bias, p->requires_grad)));
}

/* What the tensor says of itself. */
static int take(const plan* p, PyObject* object, DLTensor* t) {
  return !p->torch->dltensor_from_py_object_no_sync(object, t);
}

/* Its address and device; type, shape and strides are the plan's. */
static int take_address(const plan* p, PyObject* object, DLTensor* t) {
  DLTensor given;
  if (!take(p, object, &given)) return 0;
  t->data = (char*)given.data + given.byte_offset, t->device = given.device;
  return 1;
}

/* From a row of x, of any rank, to the next; 0 if no one stride leads through all. */
static int64_t row_pitch(const plan* p, const DLTensor* x) {
  int last = x->ndim - 1;
  if (last < 0 || x->shape[last] != p->k || (p->k > 1 && x->strides[last] != 1)) return 0;
  int64_t rows = 1, pitch = p->k;
  for (int i = last - 1; i >= 0; --i) {
    if (x->shape[i] == 1) continue;
    if (rows == 1) pitch = x->strides[i];
    else if (x->strides[i] != rows * pitch) return 0;
    rows *= x->shape[i];
  }
  return rows == p->rows ? pitch : 0;
}

static int run(const plan* p, TVMFFIAny* arguments, DLDevice device) {
  TVMFFIAny result = {0};
  void *stream = 0, *before = 0;
  int on_device = device.device_type != kDLCPU;
  if (on_device && (p->torch->current_work_stream(device.device_type, device.device_id, &stream) ||
                    p->set_stream(device.device_type, device.device_id, stream, &before)))
    return 0;
  void* thread = PyEval_SaveThread();
  int failed = p->call(p->function, arguments, ARGUMENTS, &result);
  PyEval_RestoreThread(thread);
  if (on_device && before != stream) p->set_stream(device.device_type, device.device_id, before, 0);
  if (failed) {
    void* error = 0;
    p->move_error(&error);
    if (error) p->release(error);
  }
  return !failed;
}

/* launch(x, bias) -> y, or None where only the long way will do. */
static PyObject* launch(PyObject* self, PyObject* const* args, intptr_t count) {
  const plan* p = PyLong_AsVoidPtr(self);
  PyObject *x = count > 0 ? args[0] : &_Py_NoneStruct, *bias = count > 1 ? args[1] : &_Py_NoneStruct;
  int biased = bias != &_Py_NoneStruct;
  if (!p || !is_plain(p, x) || (biased && !is_plain(p, bias)) || is_watched(p, x, bias)) return long_way();

  DLTensor tensors[ARGUMENTS];
  for (int i = 0; i < MAX_CTAS; ++i) tensors[i] = p->tensors[i];
  if (!take(p, x, &tensors[X]) || (biased && !take(p, bias, &tensors[BIAS]))) return long_way();
  for (int i = 0; i < 3; ++i)
    if (!take_address(p, p->weights[i], &tensors[CODES + i])) return long_way();
  int64_t shape[2] = {p->rows, p->k}, strides[2] = {row_pitch(p, &tensors[X]), 1};
  if (!strides[0]) return long_way();
  tensors[X].ndim = 2, tensors[X].shape = shape, tensors[X].strides = strides;

  TVMFFIAny arguments[ARGUMENTS] = {{0}};
  for (int i = 0; i < MAX_CTAS; ++i)
    if (i != BIAS || biased) arguments[i].type_index = kTVMFFIDLTensorPtr, arguments[i].v_ptr = &tensors[i];
  arguments[MAX_CTAS].type_index = kTVMFFIInt, arguments[MAX_CTAS].v_int64 = p->max_ctas;

  for (int elsewhere = 0; elsewhere < 2; ++elsewhere) {
    PyObject* y = elsewhere ? PyObject_CallNoArgs(p->empty_elsewhere) : PyObject_Call(p->empty, p->empty_arguments, 0);
    if (!y) return long_way();
    if (take_address(p, y, &tensors[Y]) && run(p, arguments, tensors[X].device)) return y;
    Py_DecRef(y);
  }
  return long_way();
}

static PyMethodDef method = {"launch", launch, METH_FASTCALL, "launch(x, bias) -> y, or None"};

/* The function for the plan at `address`, a Python integer; `owner` lives as long as it does. */
PyObject* launcher_new(PyObject* address, PyObject* owner) { return PyCFunction_NewEx(&method, address, owner); }
int64_t launcher_plan_bytes(void) { return sizeof(plan); }
