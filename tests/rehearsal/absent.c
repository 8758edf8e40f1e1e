/* What a CUDA build of torch asks of the runtime and nothing here uses: refused, whatever it is given. */
#define NOT_SUPPORTED 801
int said(int code, const char *function);
#define ABSENT(name) int name(void) { return said(NOT_SUPPORTED, __func__); }

ABSENT(cudaDeviceEnablePeerAccess)
ABSENT(cudaDeviceGetDefaultMemPool)
ABSENT(cudaMemPoolGetAttribute)
ABSENT(cudaMemPoolSetAttribute)
ABSENT(cudaMemPoolSetAccess)
ABSENT(cudaMemPoolTrimTo)
ABSENT(cudaIpcCloseMemHandle)
ABSENT(cudaIpcGetEventHandle)
ABSENT(cudaIpcGetMemHandle)
ABSENT(cudaIpcOpenEventHandle)
ABSENT(cudaIpcOpenMemHandle)
ABSENT(cudaProfilerStart)
ABSENT(cudaProfilerStop)
ABSENT(cudaStreamAddCallback)
ABSENT(cudaFuncSetAttribute)
ABSENT(cudaOccupancyMaxActiveBlocksPerMultiprocessor)
ABSENT(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags)
ABSENT(cuTensorMapEncodeTiled)
