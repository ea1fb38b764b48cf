/* The CUDA and tvm-ffi functions that the host half of a compiled kernel calls, recording instead of launching.
 *
 * Linked with an exported object into a private library by capture.py. Every answer that matters is given by Python
 * through recorder_install(); what remains here is the calling convention. No CUDA header is needed: handles are
 * opaque, and the launch configuration is passed on unread. */
#include <stddef.h>
#include <string.h>

typedef int cuda_error;

typedef struct {
  cuda_error (*device_attribute)(int attribute, int* value);
  cuda_error (*kernel_attribute)(const char* kernel, int attribute, int* value);
  cuda_error (*set_attribute)(const char* kernel, int attribute, int value);
  cuda_error (*launch)(const char* kernel, const void* config, void* const* params);
} recorder_callbacks;

static recorder_callbacks python;
static char raised_kind[64], raised_text[4096];
static int raised_cuda;

void recorder_install(const recorder_callbacks* callbacks) { python = *callbacks; }
const char* recorder_kind(void) { return raised_kind; }
const char* recorder_text(void) { return raised_text; }
int recorder_cuda_error(void) { return raised_cuda; }
void recorder_clear(void) { raised_kind[0] = raised_text[0] = 0, raised_cuda = 0; }

/* --- tvm-ffi: errors and the stream --- */

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int count) {
  recorder_clear();
  strncat(raised_kind, kind, sizeof raised_kind - 1);
  for (int i = 0; i < count; ++i)
    if (parts[i]) strncat(raised_text, parts[i], sizeof raised_text - 1 - strlen(raised_text));
}
void TVMFFIErrorSetRaisedFromCStr(const char* kind, const char* text) {
  TVMFFIErrorSetRaisedFromCStrParts(kind, &text, 1);
}
void CuteDSLRT_TVMFFISetRaisedCudaError(void* set_raised, cuda_error error) { raised_cuda = error; }
void* TVMFFIEnvGetStream(int device_type, int device) { return NULL; }

/* --- the runtime. A library handle is the fat binary's address, a kernel handle its name, which lives in the
 *     object's stack only while it is looked up: hence the copy. --- */

extern char* strdup(const char*);

cuda_error _cudaGetDevice(int* device) { return *device = 0; }
cuda_error _cudaSetDevice(int device) { return 0; }
cuda_error _cudaDeviceGetAttribute(int* value, int attribute, int device) {
  return python.device_attribute(attribute, value);
}
cuda_error _cudaLibraryLoadData(void** library, const void* code, void* jit_options, void* jit_values,
                                unsigned jit_count, void* options, void* values, unsigned count) {
  *library = (void*)code;
  return 0;
}
cuda_error _cudaLibraryGetKernel(void** kernel, void* library, const char* name) {
  *kernel = strdup(name);
  return 0;
}
cuda_error _cuKernelGetAttribute(int* value, int attribute, void* kernel, int device) {
  return python.kernel_attribute(kernel, attribute, value);
}
cuda_error _cudaFuncSetAttribute(void* kernel, int attribute, int value) {
  return python.set_attribute(kernel, attribute, value);
}
cuda_error _cudaKernelSetAttributeForDevice(void* kernel, int attribute, int value, int device) {
  return python.set_attribute(kernel, attribute, value);
}
cuda_error _cudaLaunchKernelEx(const void* config, void* kernel, void** params) {
  return python.launch(kernel, config, params);
}

/* --- the dialect's own helpers: load the library once, for the one device there is --- */

cuda_error cuda_dialect_init_library_once(void** library, cuda_error (*init)(void**),
                                          cuda_error (*load)(void**, int), void* set_raised) {
  if (*library) return 0;
  void* loaded = NULL;
  cuda_error error = init(&loaded);
  if (!error && load) error = load(&loaded, 0);
  if (!error) *library = loaded;
  return error;
}
void cuda_dialect_unload_library_once(void** library) { *library = NULL; }
