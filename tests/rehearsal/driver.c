/* Stands in for the CUDA driver as far as Triton, torch and clo call it themselves. Kernels are loaded and launched,
 * with what a driver checks of them, and do nothing: launches.py puts something in their place. */
#include "runtime.h"
#include <cuda.h>

static int context;

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = CUDART_VERSION; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int number) {
  *device = number;
  return number ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int *count) { *count = 1; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
  *value = attribute(which);
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *found, CUdevice device) {
  *found = (CUcontext)&context;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *found) { return cuDevicePrimaryCtxRetain(found, 0); }
CUresult cuCtxSetCurrent(CUcontext chosen) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return cuDeviceGet(device, 0); }
CUresult cuCtxGetLimit(size_t *value, CUlimit which) { *value = 1024; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit which, size_t value) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult code, const char **text) {
  *text = "an error of the rehearsal";
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  if (memcmp(image, "\177ELF", 4)) return CUDA_ERROR_INVALID_IMAGE;
  *module = malloc(1);
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)strdup(name);
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
  int shared = which == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
  return shared && value > attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache preferred) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *how) {
  *count = 1;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *how, CUfunction function, void **given, void **extra) {
  const unsigned sides[] = {how->gridDimX, how->gridDimY, how->gridDimZ, how->blockDimX};
  const int most[] = {cudaDevAttrMaxGridDimX, cudaDevAttrMaxGridDimY, cudaDevAttrMaxGridDimZ,
                      cudaDevAttrMaxThreadsPerBlock};
  for (int side = 0; side < 4; side++)
    if (!sides[side] || sides[side] > (unsigned)attribute(most[side])) return CUDA_ERROR_INVALID_VALUE;
  if ((int)how->sharedMemBytes > attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)) return CUDA_ERROR_INVALID_VALUE;
  launched((cudaStream_t)how->hStream);
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr address) {
  int kind = kind_of((void *)address);
  if (!kind) return CUDA_ERROR_INVALID_VALUE;
  if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)value = address;
  else if (which == CU_POINTER_ATTRIBUTE_MEMORY_TYPE) *(unsigned *)value = kind == DEVICE ? 2 : 1;
  else return CUDA_ERROR_NOT_SUPPORTED;
  return CUDA_SUCCESS;
}

CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t size, CUstream stream) {
  if (kind_of((void *)to) != DEVICE || kind_of(from) == PAGEABLE) {
    fprintf(stderr, "[rehearsal] cuMemcpyHtoDAsync needs device memory and pinned memory\n");
    return CUDA_ERROR_INVALID_VALUE;
  }
  return (CUresult)cudaMemcpyAsync((void *)to, from, size, cudaMemcpyHostToDevice, (cudaStream_t)stream);
}
