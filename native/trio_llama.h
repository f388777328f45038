/*
 * trio_llama.h - the C surface of libtrio_llama, the shim between trio-runner and llama.cpp.
 *
 * This one file is compiled as C++ with the shim and parsed by cffi for the Python binding, so the two cannot drift.
 * It is plain C with no macro in any prototype: ctypes or any other language can load the library as well.
 *
 * Rules that hold for every function:
 *   - No C++ exception and no llama.cpp assert raised on the calling thread leaves the library: it becomes a negative
 *     code, and trio_last_error() on the same thread says what happened.
 *   - Arguments are checked before llama.cpp sees them; TRIO_E_INVALID means nothing was changed.
 *   - A pointer argument is read or written only during the call, never kept. Text is UTF-8; lengths are in bytes.
 *   - A function that fills a buffer returns the number of elements the whole answer has. If that is more than the
 *     buffer holds, call again with a larger one.
 *   - A context and the samplers used with it belong to one thread at a time. A model may be read by any thread, and
 *     adapters and projectors opened, used and freed on any, also while contexts of the model decode.
 *     trio_abort(), trio_media_cancel() and the trio_load_* functions may be called from any thread at any time.
 */
#ifndef TRIO_LLAMA_H
#define TRIO_LLAMA_H
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

/* cdef: begin (cffi reads from here) */

#define TRIO_LLAMA_ABI 4 /* grows with every incompatible change of this file */

#define TRIO_OK 0
#define TRIO_NO_KV_SPACE 1  /* the batch does not fit into the KV cache; the cache is unchanged */
#define TRIO_ABORTED 2      /* trio_abort() was seen; whole micro-batches may have been kept: ask trio_seq_range() */
#define TRIO_E_INVALID -1   /* an argument was refused; nothing was changed */
#define TRIO_E_NATIVE -2    /* a C++ exception, memory exhaustion included; out of trio_step: poisoned as below */
#define TRIO_E_ASSERT -3    /* an assert of llama.cpp fired: the context (if any) is poisoned: it can only be freed */
#define TRIO_E_FATAL -4     /* llama.cpp could not compute; micro-batches already done stay in the cache */
#define TRIO_E_CANCELLED -5 /* loading, or the encoding of an image, was cancelled */
#define TRIO_E_LOAD -6      /* the file could not be loaded; trio_last_error() has llama.cpp's own words */
#define TRIO_E_GRAMMAR -7   /* the grammar does not parse, or can never produce a token */

typedef struct trio_model trio_model;
typedef struct trio_adapter trio_adapter;
typedef struct trio_context trio_context;
typedef struct trio_sampler trio_sampler;
typedef struct trio_projector trio_projector;
typedef struct trio_media trio_media;
typedef struct trio_load trio_load;

/* ---- library ---------------------------------------------------------------------------------------------------- */

int32_t trio_abi_version(void);

/* Copies the message of the last failure on this thread, NUL-terminated and cut to size. Returns its full length. */
int32_t trio_last_error(char *buffer, int32_t size);

/* Loads the backend plugins found in plugin_dir and prepares llama.cpp. Idempotent; the first call decides.
 * log_level: 1 debug, 2 info, 3 warn, 4 error, 5 nothing: lines below it are dropped before they are stored. */
int32_t trio_init(const char *plugin_dir, int32_t log_level);

/* Takes the oldest line of the log out of a bounded ring (the oldest are lost when it overflows).
 * Returns its length, 0 when there is none; *level is one of the numbers above. */
int32_t trio_log_next(char *buffer, int32_t size, int32_t *level);

/* llama.cpp's line about the compiled and the detected CPU features. */
int32_t trio_system_info(char *buffer, int32_t size);

/* ---- devices ---------------------------------------------------------------------------------------------------- */

typedef struct trio_device {
    char name[64];
    char description[128];
    char backend[64];
    char id[64];  /* the same for one piece of hardware that two backends found; may be empty */
    int32_t type; /* 0 CPU, 1 GPU, 2 integrated GPU, 3 accelerator */
    int32_t is_remote;
    uint64_t memory_free;
    uint64_t memory_total; /* bytes; both 0 where the backend does not know */
} trio_device;

/* Their numbers stay: devices are only ever added, behind the others. */
int32_t trio_device_count(void);
int32_t trio_device_get(int32_t index, trio_device *device);

/* Whether the device itself computes with this ggml_type: 1 or 0. Use 0: as weights, 1: as a KV cache under flash
 * attention. A remote device says yes to everything. */
int32_t trio_device_supports(int32_t index, int32_t use, int32_t type);

/* Adds the devices of an rpc-server, "host:port", numbered from *first on. Returns how many they are; for one that was
 * added before, the same again. Blocks for as long as the server does not answer. */
int32_t trio_rpc_add(const char *endpoint, int32_t *first);

/* ---- model ------------------------------------------------------------------------------------------------------ */

typedef struct trio_model_params {
    int32_t n_gpu_layers; /* negative: all */
    const int32_t *devices; /* numbers of those that layers may go to; none, and n_gpu_layers means nothing */
    int32_t n_devices;
    int32_t split_mode; /* over several devices: 0 not at all, 1 by layers, 2 by rows where the backend can */
    int32_t main_gpu;   /* an index into `devices`: the one that takes all with split_mode 0 */
    int32_t use_mmap;
    int32_t use_mlock;
    int32_t check_tensors;
    int32_t vocab_only;
    const float *tensor_split; /* proportions per device, or NULL */
    int32_t n_tensor_split;
    int32_t no_alloc; /* 1: no weights, only to ask a context of the model for its memory */
} trio_model_params;

/* Progress of one load, shared between the loading thread and whoever watches it. */
trio_load *trio_load_new(void);
float trio_load_progress(const trio_load *load); /* 0 to 1 */
void trio_load_cancel(trio_load *load);          /* the load returns TRIO_E_CANCELLED soon after */
void trio_load_free(trio_load *load);

int32_t trio_model_open(const char *path, const trio_model_params *params, trio_load *load, trio_model **model);
void trio_model_free(trio_model *model); /* its contexts, samplers, adapters and projectors keep it alive */

typedef struct trio_model_info {
    int32_t n_vocab, n_ctx_train, n_embd, n_layer, n_head, n_head_kv, n_swa;
    int32_t has_encoder, has_decoder, is_recurrent, is_hybrid, is_diffusion;
    int32_t has_vocab, add_bos, add_eos, add_sep;
    int32_t token_bos, token_eos, token_sep, token_eot, token_nl; /* -1 where the model has none */
    int32_t causal;       /* 0: attention looks both ways, as in BERT */
    int32_t pooling_type; /* of the file: -1 unspecified, 0 none, 1 mean, 2 cls, 3 last, 4 rank */
    int32_t max_piece;    /* bytes of the longest token's piece */
    uint64_t size;        /* bytes of all tensors */
    uint64_t n_params;
} trio_model_info;

int32_t trio_model_get_info(const trio_model *model, trio_model_info *info);
int32_t trio_model_description(const trio_model *model, char *buffer, int32_t size);
int32_t trio_model_meta_count(const trio_model *model);
int32_t trio_model_meta_key(const trio_model *model, int32_t index, char *buffer, int32_t size);
int32_t trio_model_meta_value(const trio_model *model, int32_t index, char *buffer, int32_t size);

/* Any text: long input runs on a thread with a big stack, because some tokenisers recurse with the input. */
int32_t trio_tokenize(const trio_model *model, const char *text, int32_t length, int32_t add_special,
                      int32_t parse_special, int32_t *tokens, int32_t size);
int32_t trio_detokenize(const trio_model *model, const int32_t *tokens, int32_t n_tokens, char *buffer, int32_t size);
int32_t trio_token_bytes(const trio_model *model, int32_t token, char *buffer, int32_t size);
int32_t trio_token_is_end(const trio_model *model, int32_t token);

/* A LoRA adapter, tried on a few tokens. The weights of one whose header was not looked at first may crash the process:
 * ggml multiplies tensors of any type and shape that llama.cpp lets through. */
int32_t trio_adapter_open(trio_model *model, const char *path, trio_adapter **adapter);
/* Its memory goes when no context has it set any more. May wait for a step that changes adapters. */
void trio_adapter_free(trio_adapter *adapter);

/* ---- context ---------------------------------------------------------------------------------------------------- */

typedef struct trio_context_params {
    uint32_t n_ctx; /* all sequences together */
    uint32_t n_batch;
    uint32_t n_ubatch;
    uint32_t n_seq_max;
    int32_t n_threads;       /* for steps of few rows, at most 16, and no sequence's second */
    int32_t n_threads_batch; /* for all others: prefill */
    int32_t flash_attention; /* -1 auto, 0 off, 1 on */
    int32_t type_k, type_v;  /* ggml_type of the KV cache */
    int32_t pooling_type;    /* -1: as the model says */
    int32_t offload_kqv;
    int32_t swa_full; /* 1: what a sliding window has passed is kept, so that a sequence can be cut anywhere; as long as
                         n_seq_max is at most half of what llama.cpp can have */
    float rope_freq_base, rope_freq_scale; /* 0: as the model says */
} trio_context_params;

/* Always one unified KV cache: copying part of a sequence aborts inside llama.cpp otherwise. */
int32_t trio_context_open(trio_model *model, const trio_context_params *params, trio_context **context);
/* After a failure of a context with devices, what lies on them is given up, and the model never freed: backends answer
 * to a device that is gone with an abort. */
void trio_context_free(trio_context *context);

typedef struct trio_context_info {
    int32_t n_ctx, n_batch, n_ubatch, n_seq_max, n_threads;
    int32_t pooling_type; /* in force: 0 none ... 4 rank */
    int32_t has_memory;   /* 0: nothing is kept between steps (encoders such as BERT) */
    int32_t can_shift;    /* 0: trio_seq_add is refused */
    int32_t causal;       /* 0: attention looks both ways, so a step must carry whole texts */
    int32_t n_positions;  /* positions must stay below this: n_ctx, or less where positions are a trained table */
    int32_t n_embd_out;   /* floats in one pooled vector */
    int32_t n_embd_in;    /* floats in one row of a batch's inputs; 0: the model takes tokens only */
    int32_t n_input_positions; /* of one such row: 1, or 4 with M-RoPE */
    int32_t has_encoder;       /* 1: trio_encode() must have read a sequence's source before trio_step() */
    int32_t decoder_start;     /* then the token that such a sequence begins with; -1 otherwise */
} trio_context_info;

int32_t trio_context_get_info(const trio_context *context, trio_context_info *info);

/* What a context and its model hold of a device's memory, in bytes. */
typedef struct trio_memory {
    int32_t device; /* its number; -1: the memory of this machine */
    uint64_t model, context, compute;
} trio_memory;

/* One entry for each place that something lies in; of a model without weights, what it would be. */
int32_t trio_context_memory(const trio_context *context, trio_memory *memory, int32_t size);

/* From the next batch on, instead of those set before. Changing them costs the next batch a new plan. */
int32_t trio_context_set_adapters(trio_context *context, trio_adapter *const *adapters, const float *scales,
                                  int32_t n_adapters);

/* The trio_step() of the batch with this number, running or yet to come, returns TRIO_ABORTED; no other batch is touched.
 * CPU backends stop at the next graph node, devices after a layer of a wide batch; rpc-servers finish it. Only the latest
 * call counts: the number 0, which names no batch, withdraws it. Never blocks. */
void trio_abort(trio_context *context, uint64_t number);

/* Edits of the KV cache, between steps. Positions are half-open [start, end); end -1 means "to the end".
 * trio_seq_remove returns 1 when done and 0 when this kind of memory cannot remove part of a sequence. */
int32_t trio_seq_remove(trio_context *context, int32_t seq, int32_t start, int32_t end);
int32_t trio_seq_copy(trio_context *context, int32_t source, int32_t target, int32_t start, int32_t end);
int32_t trio_seq_add(trio_context *context, int32_t seq, int32_t start, int32_t end, int32_t delta);
int32_t trio_seq_range(const trio_context *context, int32_t seq, int32_t *first, int32_t *last); /* -1, -1: empty */

/* ---- sampler ---------------------------------------------------------------------------------------------------- */

typedef struct trio_sampler_params {
    uint32_t seed;
    float temperature; /* <= 0: greedy */
    float dynatemp_range, dynatemp_exponent;
    int32_t top_k;
    float top_p, min_p, typical_p, tfs_z, top_n_sigma;
    float xtc_probability, xtc_threshold;
    int32_t repeat_last_n;
    float repeat_penalty, frequency_penalty, presence_penalty;
    int32_t penalize_nl;
    float dry_multiplier, dry_base;
    int32_t dry_allowed_length, dry_penalty_last_n;
    const char *const *dry_breakers; /* NUL-terminated strings */
    int32_t n_dry_breakers;
    int32_t mirostat; /* 0 off, 1, 2 */
    float mirostat_tau, mirostat_eta;
    const int32_t *bias_tokens;
    const float *bias_values;
    int32_t n_bias;
    const char *grammar; /* GBNF with a rule named root; NULL or "": none */
    int32_t n_top;       /* alternatives to report per token; -1: not even the chosen token's log-probability */
} trio_sampler_params;

int32_t trio_sampler_open(const trio_model *model, const trio_sampler_params *params, trio_sampler **sampler);
/* Prompt tokens count for repetition penalties but not for the grammar. */
int32_t trio_sampler_accept_prompt(trio_sampler *sampler, const int32_t *tokens, int32_t n_tokens);
void trio_sampler_free(trio_sampler *sampler);

/* ---- the step --------------------------------------------------------------------------------------------------- */

/* One row per token or row of an image, as parallel arrays of n_rows. Positions of a sequence follow one another, and
 * what it holds. With M-RoPE they may leave some out behind what it holds, and rows of an image share theirs. */
typedef struct trio_batch {
    int32_t n_rows;
    const int32_t *tokens; /* NULL where there are inputs */
    const int32_t *positions;
    const int32_t *seqs;
    const int8_t *outputs; /* 1 where logits, or the vector, are wanted */
    int32_t embeddings;    /* 1: compute vectors instead of logits, for the whole batch */
    uint64_t number;       /* its name for trio_abort(); 0: it cannot be aborted */
    const float *inputs;   /* rows of n_embd_in floats instead of tokens. Then there are n_input_positions arrays of
                              positions, one behind the other; the first one counts as the positions of the rows */
    int32_t both_ways;     /* 1: rows of a sequence see each other, later ones too; at most n_ubatch rows */
} trio_batch;

/* What to sample after the batch has run, as parallel arrays of n_samples. */
typedef struct trio_sample_request {
    int32_t n_samples;
    const int32_t *rows; /* index of the row whose logits are sampled; outputs[row] must be 1 */
    trio_sampler *const *samplers;
} trio_sample_request;

typedef struct trio_sampled {
    int32_t status; /* TRIO_OK; TRIO_E_GRAMMAR: no token is possible or the grammar costs too much; TRIO_E_NATIVE.
                       A failure is this sample's alone; its piece is the message, and its sampler is used up. */
    int32_t token;
    int32_t is_end;       /* the token ends the generation; it has no piece */
    int32_t piece_offset; /* bytes of the token, in the pieces buffer */
    int32_t piece_length;
    float logprob; /* natural log of the model's probability before any sampler; 0 when n_top is -1 */
    int32_t n_top; /* alternatives written to the top arrays */
} trio_sampled;

typedef struct trio_sample_result {
    trio_sampled *sampled; /* n_samples */
    char *pieces;
    int32_t pieces_size; /* dealt to the samples in equal parts; max_piece bytes each are always enough */
    int32_t *top_tokens; /* n_samples * top_stride, most probable first */
    float *top_logprobs;
    int32_t top_stride;
} trio_sample_result;

/* Decodes the batch and samples every requested row. The only call on the hot path. */
int32_t trio_step(trio_context *context, const trio_batch *batch, const trio_sample_request *request,
                  trio_sample_result *result);

/* Has the encoder read the source of every sequence in the batch, all of it, in rows of tokens at positions 0, 1, 2, ...;
 * at most n_ubatch rows. What other sequences had it read is forgotten, unless the result is not TRIO_OK. */
int32_t trio_encode(trio_context *context, const trio_batch *batch);

/* Copies the vector of the last embeddings step: the sequence's pooled one, or, where pooling is "none", the one of
 * the given row. Returns the number of floats. */
int32_t trio_embedding(trio_context *context, int32_t seq, int32_t row, float *values, int32_t size);

/* ---- images ----------------------------------------------------------------------------------------------------- */

typedef struct trio_projector_params {
    int32_t n_threads;
    int32_t device; /* number of the one to compute on; -1: the CPU */
    int32_t flash_attention; /* -1 auto, 0 off, 1 on */
    int32_t max_rows; /* about the most rows of an image that must be in one batch (they look both ways, or share
                         positions), where the projector can choose; 0: as the file says */
} trio_projector_params;

/* What turns images into rows for this model: a file that is called mmproj. A file whose header was not looked at first may
 * crash the process: mtmd misses few of the tensors that it needs before it uses them. */
int32_t trio_projector_open(trio_model *model, const char *path, const trio_projector_params *params, trio_load *load,
                            trio_projector **projector);
void trio_projector_free(trio_projector *projector); /* its media keep it alive */

typedef struct trio_projector_info {
    int32_t n_embd; /* floats in one row: n_embd_in of the model's contexts */
    int32_t has_vision, has_audio;
    int32_t mrope;     /* 1: rows have four positions each */
    int32_t both_ways; /* 1: rows of an image want to see each other */
    int32_t max_rows;  /* in one chunk of a large square image */
} trio_projector_info;

int32_t trio_projector_get_info(const trio_projector *projector, trio_projector_info *info);

/* One image, as a sequence of chunks: rows, and text around and between them. Fails with TRIO_E_INVALID where the
 * projector cannot take it. Data is width times height pixels of 3 bytes, red, green and blue, from the top left on. */
int32_t trio_media_open(trio_projector *projector, const uint8_t *data, int64_t n_bytes, int32_t width, int32_t height,
                        trio_media **media);
void trio_media_free(trio_media *media); /* not while it is being encoded */

typedef struct trio_chunk_info {
    int32_t is_text;
    int32_t n_rows;      /* or tokens */
    int32_t n_positions; /* how much further the position is behind it; with M-RoPE fewer than rows */
    int32_t both_ways;
} trio_chunk_info;

int32_t trio_media_count(const trio_media *media);
int32_t trio_media_get_chunk(const trio_media *media, int32_t index, trio_chunk_info *info);
int32_t trio_media_tokens(const trio_media *media, int32_t index, int32_t *tokens, int32_t size);

/* The positions of a chunk of rows, as a batch has them, where the first one is 0. Further on, that is added to all of
 * them, except to the last of four arrays. */
int32_t trio_media_positions(const trio_media *media, int32_t index, int32_t *positions, int32_t size);

/* Computes the n_rows * n_embd floats of a chunk of rows; `size` floats must have room for them. One chunk at a time is
 * computed, whatever image of the projector it belongs to; the others wait. */
int32_t trio_media_encode(trio_media *media, int32_t index, float *rows, int64_t size);

/* A trio_media_encode() of this image that waits, or runs, or comes later, returns TRIO_E_CANCELLED. */
void trio_media_cancel(trio_media *media);

/* cdef: end */

#ifdef __cplusplus
}
#endif
#endif
