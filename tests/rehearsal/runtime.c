/* Stands in for the CUDA runtime (version 13) under a CUDA build of torch, on a machine without a GPU.
 *
 * Device memory is the process's own (memory.c). Each stream is a thread that does what it is given in order, a random
 * while later; events order streams and tell the host how far they are. A stream that is captured collects what it is
 * given; each launch of the graph does that again, one after another. What CUDA refuses in a capture is refused: see
 * `unsafe`, `cudaStreamWaitEvent` and `cudaStreamEndCapture`. Kernels do nothing here: operations.py and launches.py put
 * something in their place. What is refused is said on stderr.
 */
#define _GNU_SOURCE
#include "runtime.h"
#include <pthread.h>
#include <time.h>
#include <unistd.h>

__thread cudaError_t last_error;

cudaError_t said(cudaError_t code, const char *function) {
  last_error = code;
  if (code && code != cudaErrorNoDevice && code != cudaErrorNotReady)
    fprintf(stderr, "[rehearsal] %s returns %d\n", function, code);
  return code;
}

static double now_ms(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1e3 + now.tv_nsec * 1e-6;
}

/* ---- what streams do, and what a capture collects */

enum What { COPY, FILL, CALL, STAMP, HAPPEN, AFTER, LAUNCH, HOST };
typedef struct Event { double ms; unsigned long recorded, happened; struct Capture *capture; unsigned flags; } Event;
typedef struct Node {
  enum What what;
  void *to;
  const void *from;
  size_t size;
  long number;
  Event *event;
  struct Graph *graph;
  cudaHostFn_t function;
  struct Node *next;
} Node;
typedef struct Graph { Node *first, *last; size_t count; } Graph;
typedef struct Stream {
  Graph queue;
  pthread_cond_t more;
  struct Capture *capture;
  long unjoined;
  unsigned seed, delay_us, steps_left;
  int begun;
} Stream;
typedef struct Capture {
  Graph *graph;
  Stream *origin;
  enum cudaStreamCaptureMode mode;
  pthread_t thread;
  unsigned long long number;
  struct Capture *next;
} Capture;

/* Streams are slow by turns: so long after each thing, of which so many. */
static const unsigned DELAYS_US[] = {0, 0, 0, 0, 0, 50, 50, 2000}, TURN = 16;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static Stream default_stream = {.more = PTHREAD_COND_INITIALIZER}, *streams[4096] = {&default_stream};
static int num_streams = 1, failed;
static Capture *captures;
static unsigned long long num_captures;
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static int (*do_call)(long);

static Stream *stream_of(cudaStream_t handle) { return (size_t)handle <= 2 ? &default_stream : (Stream *)handle; }

static void append(Graph *graph, Node node) {
  Node *kept = malloc(sizeof *kept);
  *kept = node;
  kept->next = NULL;
  if (graph->last) graph->last->next = kept;
  else graph->first = kept;
  graph->last = kept;
  graph->count++;
}

static void perform(const Node *node) {
  if (node->what == COPY) memmove(node->to, node->from, node->size);
  if (node->what == FILL) memset(node->to, (int)node->number, node->size);
  if (node->what == CALL && do_call(node->number)) failed = 1;
  if (node->what == STAMP) node->event->ms = now_ms();
  if (node->what == HOST) node->function(node->to);
  if (node->what == LAUNCH)
    for (Node *each = node->graph->first; each && !failed; each = each->next) perform(each);
}

static void dawdle(Stream *stream) {
  if (!stream->steps_left--) {
    stream->delay_us = DELAYS_US[rand_r(&stream->seed) % (sizeof DELAYS_US / sizeof *DELAYS_US)];
    stream->steps_left = rand_r(&stream->seed) % TURN;
  }
  if (stream->delay_us) usleep(stream->delay_us);
}

static void *work(void *of) {
  Stream *stream = of;
  pthread_mutex_lock(&lock);
  for (;;) {
    Node *node = stream->queue.first;
    if (!node) {
      pthread_cond_wait(&stream->more, &lock);
      continue;
    }
    if (node->what == AFTER && node->event->happened < (unsigned long)node->number) {
      pthread_cond_wait(&changed, &lock);
      continue;
    }
    if (node->what == HAPPEN) {
      node->event->happened = node->number;
      node->event->ms = now_ms();
    } else if (node->what != AFTER) {
      pthread_mutex_unlock(&lock);
      dawdle(stream);
      perform(node);
      pthread_mutex_lock(&lock);
    }
    stream->queue.first = node->next;
    if (!node->next) stream->queue.last = NULL;
    if (!node->next || node->what == HAPPEN) pthread_cond_broadcast(&changed);
    free(node);
  }
  return NULL;
}

/* Next in the stream, or in the graph that it is captured into. */
static void submit(Stream *stream, Node node) {
  pthread_mutex_lock(&lock);
  if (stream->capture) {
    append(stream->capture->graph, node);
    stream->unjoined++;
  } else {
    append(&stream->queue, node);
    if (!stream->begun) {
      pthread_t thread;
      stream->begun = !pthread_create(&thread, NULL, work, stream) && !pthread_detach(thread);
    }
    pthread_cond_signal(&stream->more);
  }
  pthread_mutex_unlock(&lock);
}

static cudaError_t wait_for(Stream *stream) {
  pthread_mutex_lock(&lock);
  while (stream->queue.first) pthread_cond_wait(&changed, &lock);
  pthread_mutex_unlock(&lock);
  return failed ? cudaErrorLaunchFailure : cudaSuccess;
}

void wait_for_all(void) {
  for (int n = 0; n < num_streams; n++) wait_for(streams[n]);
}

int unsafe(void) {
  int found = 0;
  if (thread_mode == cudaStreamCaptureModeRelaxed) return 0;
  pthread_mutex_lock(&lock);
  for (Capture *each = captures; each; each = each->next) {
    int all = each->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
    found |= each->mode != cudaStreamCaptureModeRelaxed && (all || pthread_equal(each->thread, pthread_self()));
  }
  pthread_mutex_unlock(&lock);
  return found;
}

void launched(cudaStream_t stream) { stream_of(stream)->unjoined++; }

/* For Python: what is called with the number of a call when its turn has come; not 0: it failed. */
void rehearsal_calls(int (*call)(long)) { do_call = call; }
int rehearsal_captures(cudaStream_t stream) { return stream_of(stream)->capture != NULL; }
void rehearsal_submit(cudaStream_t on, long call) { submit(stream_of(on), (Node){.what = CALL, .number = call}); }

/* ---- captures */

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  enum cudaStreamCaptureMode before = thread_mode;
  thread_mode = *mode;
  *mode = before;
  RETURN(cudaSuccess);
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, enum cudaStreamCaptureMode mode) {
  Stream *stream = stream_of(handle);
  if (stream == &default_stream) RETURN(cudaErrorStreamCaptureUnsupported);
  if (stream->capture) RETURN(cudaErrorIllegalState);
  Capture *capture = calloc(1, sizeof *capture);
  capture->graph = calloc(1, sizeof(Graph));
  capture->origin = stream;
  capture->mode = mode;
  capture->thread = pthread_self();
  pthread_mutex_lock(&lock);
  capture->number = ++num_captures;
  capture->next = captures;
  captures = capture;
  pthread_mutex_unlock(&lock);
  stream->capture = capture;
  RETURN(cudaSuccess);
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *graph) {
  Stream *stream = stream_of(handle);
  Capture *capture = stream->capture;
  int unjoined = 0;
  if (!capture) RETURN(cudaErrorIllegalState);
  if (capture->origin != stream) RETURN(cudaErrorStreamCaptureUnmatched);
  if (!pthread_equal(capture->thread, pthread_self())) RETURN(cudaErrorStreamCaptureWrongThread);
  for (int n = 0; n < num_streams; n++) {
    if (streams[n]->capture != capture) continue;
    unjoined |= streams[n] != stream && streams[n]->unjoined;
    streams[n]->capture = NULL;
  }
  pthread_mutex_lock(&lock);
  for (Capture **each = &captures; *each; each = &(*each)->next)
    if (*each == capture) { *each = capture->next; break; }
  pthread_mutex_unlock(&lock);
  *graph = unjoined ? NULL : (cudaGraph_t)capture->graph;
  RETURN(unjoined ? cudaErrorStreamCaptureUnjoined : cudaSuccess);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, enum cudaStreamCaptureStatus *status) {
  *status = stream_of(handle)->capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  RETURN(cudaSuccess);
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, enum cudaStreamCaptureStatus *status,
                                     unsigned long long *number, cudaGraph_t *graph, const cudaGraphNode_t **after,
                                     const cudaGraphEdgeData **edges, size_t *count) {
  Capture *capture = stream_of(handle)->capture;
  *status = capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (capture && number) *number = capture->number;
  if (capture && graph) *graph = (cudaGraph_t)capture->graph;
  if (after) *after = NULL;
  if (edges) *edges = NULL;
  if (count) *count = 0;
  RETURN(cudaSuccess);
}

/* ---- streams and events */

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  SAFE();
  Stream *made = calloc(1, sizeof *made);
  pthread_cond_init(&made->more, NULL);
  pthread_mutex_lock(&lock);
  made->seed = num_streams;
  streams[num_streams++] = made;
  pthread_mutex_unlock(&lock);
  *stream = (cudaStream_t)made;
  RETURN(cudaSuccess);
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { RETURN(cudaSuccess); }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; RETURN(cudaSuccess); }
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  if (stream_of(stream)->capture) RETURN(cudaErrorStreamCaptureUnsupported);
  RETURN(failed ? cudaErrorLaunchFailure : stream_of(stream)->queue.first ? cudaErrorNotReady : cudaSuccess);
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  SAFE();
  if (stream_of(stream)->capture) RETURN(cudaErrorStreamCaptureUnsupported);
  RETURN(wait_for(stream_of(stream)));
}
cudaError_t cudaDeviceSynchronize(void) {
  SAFE();
  wait_for_all();
  RETURN(failed ? cudaErrorLaunchFailure : cudaSuccess);
}

/* A stream that waits for a captured event joins the capture; a captured one cannot wait for what is outside. */
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t given, unsigned flags) {
  Stream *stream = stream_of(handle);
  Event *event = (Event *)given;
  Capture *theirs = event->capture;
  if (flags & cudaEventWaitExternal || !event->recorded) RETURN(cudaSuccess);
  if (!theirs && !stream->capture) submit(stream, (Node){.what = AFTER, .event = event, .number = event->recorded});
  if (theirs == stream->capture) RETURN(cudaSuccess);
  if (stream->capture) REFUSE(cudaErrorStreamCaptureIsolation, "a capture waits for an event outside");
  if (theirs->origin->capture != theirs) REFUSE(cudaErrorInvalidValue, "waits for an event of a capture that ended");
  if (stream == &default_stream) RETURN(cudaErrorStreamCaptureImplicit);
  stream->capture = theirs;
  stream->unjoined = 0;
  RETURN(cudaSuccess);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  Event *made = calloc(1, sizeof *made);
  made->flags = flags;
  *event = (cudaEvent_t)made;
  RETURN(cudaSuccess);
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { RETURN(cudaSuccess); } /* streams may still come to it */

cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t on, unsigned flags) {
  Event *event = (Event *)handle;
  Stream *stream = stream_of(on);
  event->recorded++;
  if (flags & cudaEventRecordExternal) {
    if (!stream->capture) RETURN(cudaErrorInvalidValue);
    submit(stream, (Node){.what = STAMP, .event = event});
    event->happened = event->recorded;
    event->capture = NULL;
    RETURN(cudaSuccess);
  }
  event->capture = stream->capture;
  if (stream->capture) stream->unjoined = 0; /* whoever waits for this event brings the stream's work along */
  else submit(stream, (Node){.what = HAPPEN, .event = event, .number = event->recorded});
  RETURN(cudaSuccess);
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t on) { return cudaEventRecordWithFlags(event, on, 0); }

cudaError_t cudaEventQuery(cudaEvent_t handle) {
  Event *event = (Event *)handle;
  if (event->capture) RETURN(cudaErrorCapturedEvent);
  SAFE();
  pthread_mutex_lock(&lock);
  int done = event->happened == event->recorded;
  pthread_mutex_unlock(&lock);
  RETURN(failed ? cudaErrorLaunchFailure : done ? cudaSuccess : cudaErrorNotReady);
}
cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  Event *event = (Event *)handle;
  if (event->capture) RETURN(cudaErrorCapturedEvent);
  SAFE();
  pthread_mutex_lock(&lock);
  while (event->happened != event->recorded) pthread_cond_wait(&changed, &lock);
  pthread_mutex_unlock(&lock);
  RETURN(failed ? cudaErrorLaunchFailure : cudaSuccess);
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t first, cudaEvent_t second) {
  Event *from = (Event *)first, *to = (Event *)second;
  if ((from->flags | to->flags) & cudaEventDisableTiming || !from->recorded || !to->recorded || from->capture ||
      to->capture)
    RETURN(cudaErrorInvalidResourceHandle);
  if (from->happened != from->recorded || to->happened != to->recorded) RETURN(cudaErrorNotReady);
  if (from->ms == 0 || to->ms == 0) REFUSE(cudaErrorNotReady, "asked for the time of an event that never happened");
  *ms = (float)(to->ms - from->ms);
  RETURN(cudaSuccess);
}

/* ---- graphs */

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  if (stream_of(stream)->capture) RETURN(cudaErrorStreamCaptureUnsupported);
  submit(stream_of(stream), (Node){.what = LAUNCH, .graph = (Graph *)graph});
  RETURN(failed ? cudaErrorLaunchFailure : cudaSuccess);
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
  SAFE();
  *made = (cudaGraphExec_t)graph;
  RETURN(cudaSuccess);
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { RETURN(cudaSuccess); }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { RETURN(cudaSuccess); } /* a launch may be under way */
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
  *count = ((Graph *)graph)->count;
  RETURN(cudaSuccess);
}
cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t node, cudaGraphNode_t *after, cudaGraphEdgeData *edges,
                                         size_t *count) {
  *count = 0;
  RETURN(cudaSuccess);
}
cudaError_t cudaGraphDebugDotPrint(cudaGraph_t graph, const char *path, unsigned how) { RETURN(cudaErrorNotSupported); }

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
  submit(stream_of(stream), (Node){.what = HOST, .function = function, .to = data});
  RETURN(cudaSuccess);
}

/* ---- copies */

/* With memory that is not pinned the host waits: as CUDA says for what is read, and stricter for what is written. */
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t handle) {
  Stream *stream = stream_of(handle);
  Range target = range_of(to), source = range_of(from);
  if (leaves(target, to, size) || leaves(source, from, size))
    REFUSE(cudaErrorInvalidValue, "a copy of %zu bytes leaves its allocation", size);
  int pageable = !target.kind || !source.kind;
  if (pageable && stream->capture) REFUSE(cudaErrorStreamCaptureUnsupported, "a capture copies pageable memory");
  submit(stream, (Node){.what = COPY, .to = to, .from = from, .size = size});
  RETURN(pageable ? wait_for(stream) : cudaSuccess);
}
cudaError_t cudaMemcpyPeerAsync(void *to, int there, const void *from, int here, size_t size, cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, size, cudaMemcpyDefault, stream);
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  SAFE();
  cudaError_t code = cudaMemcpyAsync(to, from, size, kind, NULL);
  RETURN(code ? code : wait_for(&default_stream));
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
  cudaError_t code = cudaSuccess;
  for (size_t row = 0; row < height && !code; row++)
    code = cudaMemcpyAsync((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width, kind, stream);
  return code;
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
  submit(stream_of(stream), (Node){.what = FILL, .to = to, .number = value, .size = size});
  RETURN(cudaSuccess);
}
cudaError_t cudaMemset(void *to, int value, size_t size) { SAFE(); return cudaMemsetAsync(to, value, size, NULL); }
