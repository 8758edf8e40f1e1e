/* The other half of runtime.c: the device by its numbers, an H200's, and kernels of libraries, which do nothing. */
#define _GNU_SOURCE
#include "runtime.h"
#include <dlfcn.h>

int attribute(int which) {
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrMemoryClockRate: return 3201000;
    case cudaDevAttrGlobalMemoryBusWidth: return 6144;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrL2CacheSize: return 62914560;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrAsyncEngineCount: return 3;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrUnifiedAddressing: case cudaDevAttrCanMapHostMemory: case cudaDevAttrCooperativeLaunch: return 1;
    default: return 0;
  }
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) {
  *value = attribute(which);
  RETURN(cudaSuccess);
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
  memset(found, 0, sizeof *found);
  strcpy(found->name, "NVIDIA H200");
  found->totalGlobalMem = DEVICE_BYTES;
  found->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  found->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  found->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  found->regsPerBlock = found->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerBlock);
  found->warpSize = attribute(cudaDevAttrWarpSize);
  for (int side = 0; side < 3; side++) {
    found->maxThreadsDim[side] = attribute(cudaDevAttrMaxBlockDimX + side);
    found->maxGridSize[side] = attribute(cudaDevAttrMaxGridDimX + side);
  }
  found->maxThreadsPerBlock = found->maxThreadsDim[0];
  found->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  found->maxBlocksPerMultiProcessor = attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
  found->major = attribute(cudaDevAttrComputeCapabilityMajor);
  found->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
  found->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
  found->memoryBusWidth = attribute(cudaDevAttrGlobalMemoryBusWidth);
  found->asyncEngineCount = attribute(cudaDevAttrAsyncEngineCount);
  found->unifiedAddressing = found->canMapHostMemory = found->concurrentKernels = found->cooperativeLaunch = 1;
  RETURN(cudaSuccess);
}

cudaError_t cudaGetDeviceCount(int *count) {
  const char *visible = getenv("CUDA_VISIBLE_DEVICES");
  *count = !(visible && (!*visible || !strcmp(visible, "-1")));
  RETURN(*count ? cudaSuccess : cudaErrorNoDevice);
}
cudaError_t cudaGetDevice(int *device) { *device = 0; RETURN(cudaSuccess); }
cudaError_t cudaSetDevice(int device) { RETURN(device ? cudaErrorInvalidDevice : cudaSuccess); }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; RETURN(cudaSuccess); }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; RETURN(cudaSuccess); }
cudaError_t cudaGetLastError(void) {
  cudaError_t code = last_error;
  last_error = cudaSuccess;
  return code;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }
const char *cudaGetErrorName(cudaError_t code) {
  static __thread char text[40];
  snprintf(text, sizeof text, "error %d of the rehearsal", code);
  return text;
}
const char *cudaGetErrorString(cudaError_t code) { return cudaGetErrorName(code); }
cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int device) {
  snprintf(text, size, "0000:01:00.0");
  RETURN(cudaSuccess);
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  RETURN(cudaSuccess);
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int other) { *can = 0; RETURN(cudaSuccess); }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **found, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  void *driver = dlopen("libcuda.so.1", RTLD_LAZY);
  *found = driver ? dlsym(driver, name) : NULL;
  if (result) *result = *found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  RETURN(*found ? cudaSuccess : cudaErrorSymbolNotFound);
}
/* ---- kernels of the libraries: nothing but `torch.cuda._sleep` should come here */

typedef struct { const void *function; const char *name; } Kernel;
static Kernel *kernels;
static int num_kernels, room_for_kernels;

static cudaError_t launch(const void *function, cudaStream_t stream) {
  const char *name = "unknown";
  for (int n = 0; n < num_kernels; n++)
    if (kernels[n].function == function) name = kernels[n].name;
  if (!strstr(name, "spin_kernel")) fprintf(stderr, "[rehearsal] a kernel that does nothing here: %.200s\n", name);
  launched(stream);
  RETURN(cudaSuccess);
}

void **__cudaRegisterFatBinary(void *image) { static void *handle[4]; return handle; }
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int a, size_t size, int b, int c) {}
char __cudaInitModule(void **handle) { return 0; }
void __cudaRegisterFunction(void **handle, const char *function, char *device, const char *name, int limit, void *a,
                            void *b, void *c, void *d, int *e) {
  if (num_kernels == room_for_kernels) {
    room_for_kernels = room_for_kernels ? 2 * room_for_kernels : 1 << 16;
    kernels = realloc(kernels, room_for_kernels * sizeof *kernels);
  }
  kernels[num_kernels++] = (Kernel){function, name};
}
static __thread struct { dim3 grid, block; size_t shared; void *stream; } configuration;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  configuration.grid = grid;
  configuration.block = block;
  configuration.shared = shared;
  configuration.stream = stream;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *(void **)stream = configuration.stream;
  RETURN(cudaSuccess);
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  *kernel = (cudaKernel_t)function;
  RETURN(cudaSuccess);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **given, size_t shared,
                               cudaStream_t on) {
  return launch(kernel, on);
}
cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **given, size_t shared, cudaStream_t on) {
  return launch(kernel, on);
}
cudaError_t cudaLaunchCooperativeKernel(const void *kernel, dim3 grid, dim3 block, void **given, size_t shared,
                                        cudaStream_t on) {
  return launch(kernel, on);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *how, const void *kernel, void **given) {
  return launch(kernel, how->stream);
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *kernel) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->ptxVersion = found->binaryVersion = 90;
  RETURN(cudaSuccess);
}
