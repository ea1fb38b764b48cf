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
extern PyObject _Py_NoneStruct, _Py_TrueStruct, _Py_NotImplementedStruct;
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
#define MOST_RANKS 8

typedef struct {
  void* owner;                            /* the Python object whose memory this is */
  PyObject *activation, *overlap;         /* the call it serves: these arguments, */
  int64_t rank, shape[MOST_RANKS];        /* an x of this shape, */
  int64_t bias_type;                      /* a bias of this DLDataType, or -1 for none */
  PyObject* watches[MOST_WATCHES];        /* called without arguments, or asked for an attribute; NULL ends */
  PyObject* attributes[MOST_WATCHES];     /* its name, NULL for a call */
  PyObject* quiet[MOST_WATCHES];          /* what comes back if nothing stands in the way */
  int64_t torch_watches;                  /* so many are torch's; the others tell whether the plan is out of date */
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

typedef struct {
  PyObject* tensor_types[2];              /* what x and bias may be: exactly these, no subclass */
  const DLPackExchangeAPI* torch;
  int64_t count;
  plan* plans[];                          /* the one used last comes first */
} table;

static PyObject* answer(PyObject* value) {
  PyErr_Clear();
  Py_IncRef(value);
  return value;
}
static PyObject* long_way(void) { return answer(&_Py_NoneStruct); }

static int is_plain(const table* t, PyObject* object) {
  PyObject* type = PyObject_Type(object);
  Py_DecRef(type);
  return type == t->tensor_types[0] || type == t->tensor_types[1];
}

static int is_same(PyObject* a, PyObject* b) { return a == b || PyObject_RichCompareBool(a, b, Py_EQ) == 1; }

static int serves(const plan* p, const DLTensor* x, int64_t bias_type, PyObject* activation, PyObject* overlap) {
  if (p->rank != x->ndim || p->bias_type != bias_type) return 0;
  for (int i = 0; i < x->ndim; ++i)
    if (p->shape[i] != x->shape[i]) return 0;
  return is_same(p->activation, activation) && is_same(p->overlap, overlap);
}

/* The plan for such a call, moved to the front; NULL if there is none. */
static plan* find(table* t, const DLTensor* x, int64_t bias_type, PyObject* activation, PyObject* overlap) {
  for (int64_t i = 0; i < t->count; ++i)
    if (serves(t->plans[i], x, bias_type, activation, overlap)) {
      plan* found = t->plans[i];
      for (; i > 0; --i) t->plans[i] = t->plans[i - 1];
      return t->plans[0] = found;
    }
  return 0;
}

static int is_true(PyObject* value) {
  if (value) Py_DecRef(value);
  return value == &_Py_TrueStruct;
}

/* Whether the answers of the watches from `begin` on, but before `end`, are the quiet ones. */
static int all_quiet(const plan* p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end && p->watches[i]; ++i) {
    PyObject* name = p->attributes[i];
    PyObject* value = name ? PyObject_GetAttr(p->watches[i], name) : PyObject_CallNoArgs(p->watches[i]);
    int quiet = value && is_same(value, p->quiet[i]);
    if (value) Py_DecRef(value);
    if (!quiet) return 0;
  }
  return 1;
}

static int wants_gradient(const plan* p, PyObject* x, PyObject* bias) {
  if (!is_true(PyObject_CallNoArgs(p->is_grad_enabled))) return 0;
  return is_true(PyObject_GetAttr(x, p->requires_grad)) ||
         (bias != &_Py_NoneStruct && is_true(PyObject_GetAttr(bias, p->requires_grad)));
}

/* Its address and device; type, shape and strides are the plan's. */
static int take_address(const plan* p, PyObject* object, DLTensor* t) {
  DLTensor given;
  if (p->torch->dltensor_from_py_object_no_sync(object, &given)) return 0;
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

/* launch(x, bias, activation, overlap) -> y; None where only the long way will do; NotImplemented where no plan serves
 * the call. */
static PyObject* launch(PyObject* self, PyObject* const* args, intptr_t count) {
  table* t = PyLong_AsVoidPtr(self);
  if (!t || count != 4) return long_way();
  PyObject *x = args[0], *bias = args[1];
  int biased = bias != &_Py_NoneStruct;
  if (!is_plain(t, x) || (biased && !is_plain(t, bias))) return long_way();
  DLTensor tensors[ARGUMENTS];
  if (t->torch->dltensor_from_py_object_no_sync(x, &tensors[X])) return long_way();
  if (biased && t->torch->dltensor_from_py_object_no_sync(bias, &tensors[BIAS])) return long_way();
  const DLDataType of_bias = tensors[BIAS].dtype;
  plan* p = find(t, &tensors[X], biased ? of_bias.code | of_bias.bits << 8 | of_bias.lanes << 16 : -1, args[2], args[3]);
  if (!p) return answer(&_Py_NotImplementedStruct);
  if (!all_quiet(p, 0, p->torch_watches) || wants_gradient(p, x, bias)) return long_way();
  if (!all_quiet(p, p->torch_watches, MOST_WATCHES)) {
    for (int64_t i = 1; i < t->count; ++i) t->plans[i - 1] = t->plans[i]; /* found, it was the first */
    t->count--;
    return answer(&_Py_NotImplementedStruct);
  }

  static const int fixed[] = {CODES, SCALES, ALPHA};
  for (int i = 0; i < 3; ++i) {
    tensors[fixed[i]] = p->tensors[fixed[i]];
    if (!take_address(p, p->weights[i], &tensors[fixed[i]])) return long_way();
  }
  tensors[Y] = p->tensors[Y];
  int64_t shape[2] = {p->rows, p->k}, strides[2] = {row_pitch(p, &tensors[X]), 1};
  if (!strides[0]) return long_way();
  tensors[X].ndim = 2, tensors[X].shape = shape, tensors[X].strides = strides;

  TVMFFIAny arguments[ARGUMENTS] = {{0}};
  for (int i = 0; i < MAX_CTAS; ++i)
    if (i != BIAS || biased) arguments[i].type_index = kTVMFFIDLTensorPtr, arguments[i].v_ptr = &tensors[i];
  arguments[MAX_CTAS].type_index = kTVMFFIInt, arguments[MAX_CTAS].v_int64 = p->max_ctas;

  PyObject *owner = p->owner, *y = 0;
  Py_IncRef(owner); /* another thread may forget the plan while this one is in the driver */
  for (int elsewhere = 0; elsewhere < 2 && !y; ++elsewhere) {
    y = elsewhere ? PyObject_CallNoArgs(p->empty_elsewhere) : PyObject_Call(p->empty, p->empty_arguments, 0);
    if (y && !(take_address(p, y, &tensors[Y]) && run(p, arguments, tensors[X].device))) Py_DecRef(y), y = 0;
  }
  Py_DecRef(owner);
  return y ? y : long_way();
}

static PyMethodDef method = {"launch", launch, METH_FASTCALL, 0};

/* The function for the table at `address`, a Python integer; `owner` lives as long as it does. */
PyObject* launcher_new(PyObject* address, PyObject* owner) { return PyCFunction_NewEx(&method, address, owner); }
int launcher_takes(const DLPackExchangeAPI* torch, PyObject* tensor) {
  DLTensor given;
  int failed = torch->dltensor_from_py_object_no_sync(tensor, &given);
  PyErr_Clear();
  return !failed;
}
int64_t launcher_plan_bytes(void) { return sizeof(plan); }
int64_t launcher_table_bytes(void) { return sizeof(table); }
