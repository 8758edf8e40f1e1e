/* What runtime.c, device.c and driver.c know of each other. */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define RETURN(code) return said(code, __func__)
#define REFUSE(code, ...) return fprintf(stderr, "[rehearsal] " __VA_ARGS__), fputc('\n', stderr), said(code, __func__)

static const size_t DEVICE_BYTES = 150754820096ULL, RESERVED_BYTES = 600ULL << 20;
enum Kind { PAGEABLE, DEVICE, PINNED, REGISTERED };

/* The code, kept for cudaGetLastError and told on stderr if it says that something failed. */
cudaError_t said(cudaError_t code, const char *function);
extern __thread cudaError_t last_error;
/* A kernel was launched on the stream. */
void launched(cudaStream_t stream);
/* Whether a capture under way forbids a call that may wait, or allocate: here, or in any thread if it is global. */
int unsafe(void);
#define SAFE() do { if (unsafe()) RETURN(cudaErrorStreamCaptureUnsupported); } while (0)
/* Until every stream has done what was submitted. */
void wait_for_all(void);

typedef struct { char *start; size_t size; enum Kind kind; } Range;
/* The allocation that an address is in. */
Range range_of(const void *address);
int kind_of(const void *address);
/* Whether so many bytes from an address on reach beyond its allocation. */
int leaves(Range range, const void *address, size_t size);
/* What an H200 says. */
int attribute(int which);
