/*
 * trio_llama.h - the C surface of libtrio_llama, the shim between trio-runner and llama.cpp.
 *
 * This one file is compiled with the shim and parsed by cffi for the Python binding, so the two cannot differ.
 * It is plain C with no macro in any prototype: ctypes or any other language can load the library too.
 *
 * Rules that hold for every function:
 *   - A C++ exception or a failed assert of llama.cpp on the calling thread never leaves the library. It becomes a
 *     negative code, and trio_last_error() on the same thread returns the message.
 *   - Arguments are checked before llama.cpp sees them. TRIO_E_INVALID means that nothing was changed.
 *   - A pointer argument is read or written during the call only, and never kept. Text is UTF-8; lengths are in bytes.
 *   - A function that fills a buffer returns how many elements the whole answer has. If the buffer holds fewer, call
 *     again with a larger one.
 *   - A context and the samplers used with it belong to one thread at a time. Any thread may read a model, and open,
 *     use and free adapters and projectors, even while contexts of the model decode.
 *     trio_abort(), trio_media_cancel() and the trio_load_* functions may be called from any thread at any time.
 */
#ifndef TRIO_LLAMA_H
#define TRIO_LLAMA_H
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

/* cdef: begin (cffi reads from here) */

#define TRIO_LLAMA_ABI 8 /* grows with every incompatible change of this file */

#define TRIO_OK 0
#define TRIO_NO_KV_SPACE 1  /* the batch does not fit into the KV cache; the cache is unchanged */
#define TRIO_ABORTED 2      /* by trio_abort(); finished micro-batches may be in the cache: ask trio_seq_range() */
#define TRIO_E_INVALID -1   /* an argument was refused; nothing was changed */
#define TRIO_E_NATIVE -2    /* a C++ exception, or out of memory; from trio_step(), the context is poisoned as below */
#define TRIO_E_ASSERT -3    /* an assert of llama.cpp failed; the context (if any) is poisoned: it can only be freed */
#define TRIO_E_FATAL -4     /* llama.cpp could not compute; finished micro-batches stay in the cache */
#define TRIO_E_CANCELLED -5 /* loading, or the encoding of an image, was cancelled */
#define TRIO_E_LOAD -6      /* the file could not be loaded; trio_last_error() has llama.cpp's reason */
#define TRIO_E_GRAMMAR -7   /* the grammar or schema does not parse, or can never produce a token */

typedef struct trio_model trio_model;
typedef struct trio_adapter trio_adapter;
typedef struct trio_context trio_context;
typedef struct trio_sampler trio_sampler;
typedef struct trio_schema trio_schema;
typedef struct trio_projector trio_projector;
typedef struct trio_media trio_media;
typedef struct trio_load trio_load;

/* ---- library ---------------------------------------------------------------------------------------------------- */

int32_t trio_abi_version(void);

/* Copies the message of the last failure on this thread, NUL-terminated and cut to size. Returns its full length. */
int32_t trio_last_error(char *buffer, int32_t size);

/* Loads the backend plugins in plugin_dir and prepares llama.cpp. Only the first call that succeeds has an effect.
 * log_level: 1 debug, 2 info, 3 warn, 4 error, 5 nothing. Lines of a lower level are not stored. */
int32_t trio_init(const char *plugin_dir, int32_t log_level);

/* Removes the oldest line from the log and copies it. The log keeps the newest 1024 lines. Returns the line's length,
 * or 0 if there is none; *level is one of the numbers above. */
int32_t trio_log_next(char *buffer, int32_t size, int32_t *level);

/* llama.cpp's line about the compiled and the detected CPU features. */
int32_t trio_system_info(char *buffer, int32_t size);

/* ---- devices ---------------------------------------------------------------------------------------------------- */

typedef struct trio_device {
    char name[64];
    char description[128];
    char backend[64];
    char id[64];  /* of the hardware, so the same if two backends found it; may be empty */
    int32_t type; /* 0 CPU, 1 GPU, 2 integrated GPU, 3 accelerator */
    int32_t is_remote;
    uint64_t memory_free;
    uint64_t memory_total; /* bytes; both are 0 if the backend does not know */
} trio_device;

/* Devices are numbered from 0. A number never changes: new devices come behind the others. */
int32_t trio_device_count(void);
int32_t trio_device_get(int32_t index, trio_device *device);

/* Returns 1 if the device itself can compute with this ggml_type, else 0. `use` 0: as weights; 1: as a KV cache with
 * flash attention. A remote device answers 1 for everything. */
int32_t trio_device_supports(int32_t index, int32_t use, int32_t type);

/* Adds the devices of an rpc-server, "host:port". Returns how many there are; *first is the number of the first one. A
 * server that was added before gives the same answer again. Blocks until the server answers. */
int32_t trio_rpc_add(const char *endpoint, int32_t *first);

/* ---- model ------------------------------------------------------------------------------------------------------ */

typedef struct trio_model_params {
    int32_t n_gpu_layers; /* negative: all */
    const int32_t *devices; /* numbers of those that may hold layers; without any, n_gpu_layers has no effect */
    int32_t n_devices;
    int32_t split_mode; /* over several devices: 0 no split, 1 by layers, 2 by rows where the backend can */
    int32_t main_gpu;   /* an index into `devices`: the one that holds everything with split_mode 0 */
    int32_t use_mmap;
    int32_t use_mlock;
    int32_t check_tensors;
    int32_t vocab_only;
    const float *tensor_split; /* proportions per device, or NULL */
    int32_t n_tensor_split;
    int32_t no_alloc; /* 1: load no weights; a context of the model only tells how much memory it would take */
} trio_model_params;

/* Progress of one load, shared between the thread that loads and those that watch it. */
trio_load *trio_load_new(void);
float trio_load_progress(const trio_load *load); /* 0 to 1 */
void trio_load_cancel(trio_load *load);          /* the load returns TRIO_E_CANCELLED soon after */
void trio_load_free(trio_load *load);

int32_t trio_model_open(const char *path, const trio_model_params *params, trio_load *load, trio_model **model);
/* The model lives until its contexts, samplers, adapters and projectors are freed too. */
void trio_model_free(trio_model *model);

typedef struct trio_model_info {
    int32_t n_vocab, n_ctx_train, n_embd, n_layer, n_head, n_head_kv, n_swa;
    int32_t has_encoder, has_decoder, is_recurrent, is_hybrid, is_diffusion;
    int32_t has_vocab, add_bos, add_eos, add_sep;
    int32_t token_bos, token_eos, token_sep, token_eot, token_nl; /* -1: the model has none */
    int32_t token_fim_pre, token_fim_suf, token_fim_mid;          /* fill in the middle; -1: none */
    int32_t token_fim_rep, token_fim_sep; /* before the name of a repository, and between two files; -1: none */
    int32_t causal;       /* 0: attention is non-causal, as in BERT */
    int32_t pooling_type; /* in the file: -1 unspecified, 0 none, 1 mean, 2 cls, 3 last, 4 rank */
    int32_t max_piece;    /* bytes of the longest token's piece */
    uint64_t size;        /* bytes of all tensors */
    uint64_t n_params;
} trio_model_info;

int32_t trio_model_get_info(const trio_model *model, trio_model_info *info);
int32_t trio_model_description(const trio_model *model, char *buffer, int32_t size);
int32_t trio_model_meta_count(const trio_model *model);
int32_t trio_model_meta_key(const trio_model *model, int32_t index, char *buffer, int32_t size);
int32_t trio_model_meta_value(const trio_model *model, int32_t index, char *buffer, int32_t size);

/* The text may have any length. A long one is tokenised on a thread with a big stack: some tokenisers recurse. */
int32_t trio_tokenize(const trio_model *model, const char *text, int32_t length, int32_t add_special,
                      int32_t parse_special, int32_t *tokens, int32_t size);
int32_t trio_detokenize(const trio_model *model, const int32_t *tokens, int32_t n_tokens, char *buffer, int32_t size);
int32_t trio_token_bytes(const trio_model *model, int32_t token, char *buffer, int32_t size);
int32_t trio_token_is_end(const trio_model *model, int32_t token);

/* Opens a LoRA adapter and tries it on a few tokens. Check the header of an untrusted file first: llama.cpp accepts
 * tensors of types and shapes that crash the process when ggml multiplies them. */
int32_t trio_adapter_open(trio_model *model, const char *path, trio_adapter **adapter);
/* Its memory is released when no context has it set any more. May wait for a step that changes adapters. */
void trio_adapter_free(trio_adapter *adapter);

/* ---- context ---------------------------------------------------------------------------------------------------- */

typedef struct trio_context_params {
    uint32_t n_ctx; /* positions of all sequences together */
    uint32_t n_batch;
    uint32_t n_ubatch;
    uint32_t n_seq_max;
    int32_t n_threads;       /* for narrow steps: at most 16 rows, no two of one sequence */
    int32_t n_threads_batch; /* for all other steps, such as prefill */
    int32_t flash_attention; /* -1 auto, 0 off, 1 on */
    int32_t type_k, type_v;  /* ggml_type of the KV cache */
    int32_t pooling_type;    /* -1: the model's own */
    int32_t offload_kqv;
    int32_t swa_full; /* 1: cells outside a sliding window are kept, so that a sequence can be cut anywhere. Holds while
                         n_seq_max is at most half of the sequences that llama.cpp can have */
    float rope_freq_base, rope_freq_scale; /* 0: the model's own */
} trio_context_params;

/* All sequences share one unified KV cache: otherwise llama.cpp aborts when part of a sequence is copied. */
int32_t trio_context_open(trio_model *model, const trio_context_params *params, trio_context **context);
/* After a failure of a context with devices, its memory on them and the model's are never released: a backend answers
 * to a lost device with an abort. */
void trio_context_free(trio_context *context);

typedef struct trio_context_info {
    int32_t n_ctx, n_batch, n_ubatch, n_seq_max, n_threads;
    int32_t pooling_type; /* in force: 0 none ... 4 rank */
    int32_t has_memory;   /* 0: nothing is kept between steps (encoders such as BERT) */
    int32_t can_shift;    /* 0: trio_seq_add is refused */
    int32_t causal;       /* 0: attention is non-causal, so a step must contain whole texts */
    int32_t n_positions;  /* every position is below this: n_ctx, or less if the model has a table of positions */
    int32_t n_embd_out;   /* floats in one embedding */
    int32_t n_embd_in;    /* floats in one row of a batch's inputs; 0: the model takes tokens only */
    int32_t n_input_positions; /* of one such row: 1, or 4 with M-RoPE */
    int32_t has_encoder;       /* 1: trio_encode() must have read a sequence's encoder tokens before trio_step() */
    int32_t decoder_start;     /* the token that such a sequence begins with; -1 without an encoder */
} trio_context_info;

int32_t trio_context_get_info(const trio_context *context, trio_context_info *info);

/* The memory that a context and its model take on one device, in bytes. */
typedef struct trio_memory {
    int32_t device; /* its number; -1: the memory of this machine */
    uint64_t model, context, compute;
} trio_memory;

/* One entry for each device that holds something. For a model without weights: what it would take. */
int32_t trio_context_memory(const trio_context *context, trio_memory *memory, int32_t size);

/* Sets the adapters of the next batches, instead of those set before. After a change, the next batch plans its graphs
 * again. */
int32_t trio_context_set_adapters(trio_context *context, trio_adapter *const *adapters, const float *scales,
                                  int32_t n_adapters);

/* Makes the trio_step() of the batch with this number, running or yet to come, return TRIO_ABORTED. Other batches are
 * not affected. CPU backends stop at the next graph node, devices after a layer of a wide batch, rpc-servers at the
 * end of the batch. Only the latest call counts; the number 0, which no batch has, withdraws it. Never blocks. */
void trio_abort(trio_context *context, uint64_t number);

/* Edits of the KV cache, between steps. Positions are half-open, [start, end); an end of -1 means "to the end".
 * trio_seq_remove() returns 1 when done, and 0 if this kind of memory cannot remove part of a sequence. */
int32_t trio_seq_remove(trio_context *context, int32_t seq, int32_t start, int32_t end);
int32_t trio_seq_copy(trio_context *context, int32_t source, int32_t target, int32_t start, int32_t end);
int32_t trio_seq_add(trio_context *context, int32_t seq, int32_t start, int32_t end, int32_t delta);
int32_t trio_seq_range(const trio_context *context, int32_t seq, int32_t *first, int32_t *last); /* -1, -1: empty */

/* ---- JSON schemas ----------------------------------------------------------------------------------------------- */

/* Functions of llguidance's C interface, each by its address. Their names there begin with llg_ or llg_matcher_. */
typedef struct trio_schema_functions {
    void *new_tokenizer_v2, *free_tokenizer;
    void *new_matcher, *clone_matcher, *free_matcher;
    void *compute_mask_into, *consume_token, *is_stopped, *get_error;
    void *get_cancellation_handle, *cancel, *free_cancellation_handle;
} trio_schema_functions;

/* Tells the shim where the functions are. The library that has them must stay loaded. Only the first call has an
 * effect. */
int32_t trio_schema_use(const trio_schema_functions *functions);

/* Compiles a JSON schema. The first one of a model takes longer, a tenth of a second or more. Fails with TRIO_E_GRAMMAR
 * if the schema cannot be honoured. From any thread. */
int32_t trio_schema_open(trio_model *model, const char *text, trio_schema **schema);
void trio_schema_free(trio_schema *schema); /* any number of samplers may have been made with it, and live on */

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
    int32_t ignore_eos; /* 1: tokens that end the generation are never chosen */
    const char *grammar; /* GBNF with a rule named root; NULL or "": none */
    const trio_schema *json_schema; /* of the same model; NULL: none */
    int32_t n_top;       /* alternatives to report for each token; -1: not even the chosen token's log-probability */
    int32_t post_sampling_probs; /* 1: report probabilities as they are after all samplers, not the model's own */
} trio_sampler_params;

int32_t trio_sampler_open(const trio_model *model, const trio_sampler_params *params, trio_sampler **sampler);
/* Prompt tokens count for the repetition penalties, but not for the grammar or the schema. */
int32_t trio_sampler_accept_prompt(trio_sampler *sampler, const int32_t *tokens, int32_t n_tokens);
/* Chooses a token from n_vocab logits, as a step does. Returns the token. For measurements. */
int32_t trio_sampler_sample(trio_sampler *sampler, const float *logits, int32_t n_logits);
void trio_sampler_free(trio_sampler *sampler);

/* ---- the step --------------------------------------------------------------------------------------------------- */

/* A row is a token, or a row of an image. Arrays have n_rows elements. The positions of a sequence are consecutive and
 * continue those that it holds. With M-RoPE there may be a gap in between, and rows of an image share positions. */
typedef struct trio_batch {
    int32_t n_rows;
    const int32_t *tokens; /* NULL if there are inputs */
    const int32_t *positions;
    const int32_t *seqs;
    const int8_t *outputs; /* 1 for rows whose logits or embedding are wanted */
    int32_t embeddings;    /* 1: compute embeddings instead of logits, for the whole batch */
    uint64_t number;       /* identifies the batch for trio_abort(); 0: it cannot be aborted */
    const float *inputs;   /* rows of n_embd_in floats instead of tokens. Then `positions` has n_input_positions
                              arrays, one behind the other; the first has the positions in the sequence */
    int32_t non_causal;    /* 1: a row also sees later rows of its sequence; at most n_ubatch rows */
} trio_batch;

/* What to sample after the batch has run. Arrays have n_samples elements. */
typedef struct trio_sample_request {
    int32_t n_samples;
    const int32_t *rows; /* index of the row whose logits are sampled; outputs[row] must be 1 */
    trio_sampler *const *samplers;
} trio_sample_request;

typedef struct trio_sampled {
    int32_t status; /* TRIO_OK; TRIO_E_GRAMMAR: no token is possible, or the grammar or schema costs too much;
                       TRIO_E_NATIVE.
                       A failure affects this sample only. Its piece is the message; its sampler cannot go on. */
    int32_t token;
    int32_t is_end;       /* the token ends the generation. It has no piece, unless it ends a value of a schema */
    int32_t piece_offset; /* bytes of the token, in the pieces buffer */
    int32_t piece_length;
    float logprob; /* natural log of the model's probability before any sampler, or, with post_sampling_probs, of that
                      after all of them; 0 when n_top is -1 */
    int32_t n_top; /* alternatives written to the top arrays */
} trio_sampled;

typedef struct trio_sample_result {
    trio_sampled *sampled; /* n_samples */
    char *pieces;
    int32_t pieces_size; /* divided among the samples in equal parts; max_piece bytes for each are always enough */
    int32_t *top_tokens; /* n_samples * top_stride, most probable first */
    float *top_logprobs;
    int32_t top_stride;
} trio_sample_result;

/* Decodes the batch and samples every requested row. The only call in the decode loop. */
int32_t trio_step(trio_context *context, const trio_batch *batch, const trio_sample_request *request,
                  trio_sample_result *result);

/* How probable the model found `token` after a row of the last step that had an output: writes the natural log of that.
 * Also writes the n_top most probable tokens, most probable first, and returns how many these are. */
int32_t trio_score(trio_context *context, int32_t row, int32_t token, int32_t n_top, float *logprob,
                   int32_t *top_tokens, float *top_logprobs);

/* Runs the encoder on the batch: for each sequence in it, all its encoder tokens, at positions 0, 1, 2, ...; at most
 * n_ubatch rows in all. If the result is TRIO_OK, the encoder tokens of all other sequences are forgotten. */
int32_t trio_encode(trio_context *context, const trio_batch *batch);

/* Copies an embedding that the last step computed: the sequence's, or the row's if pooling is "none". Returns the
 * number of floats. */
int32_t trio_embedding(trio_context *context, int32_t seq, int32_t row, float *values, int32_t size);

/* ---- images ----------------------------------------------------------------------------------------------------- */

typedef struct trio_projector_params {
    int32_t n_threads;
    int32_t device; /* number of the one to compute on; -1: the CPU */
    int32_t flash_attention; /* -1 auto, 0 off, 1 on */
    int32_t max_rows; /* most rows of an image that must be in one batch, because attention among them is non-causal or
                         they share positions. An approximate limit for projectors that can choose; 0: the file's own */
} trio_projector_params;

/* Opens a projector, a file called mmproj, which turns images into rows for this model. Check the header of an
 * untrusted file first: mtmd uses many tensors without checking that the file has them, which crashes the process. */
int32_t trio_projector_open(trio_model *model, const char *path, const trio_projector_params *params, trio_load *load,
                            trio_projector **projector);
void trio_projector_free(trio_projector *projector); /* it lives until its media are freed too */

typedef struct trio_projector_info {
    int32_t n_embd; /* floats in one row: n_embd_in of the model's contexts */
    int32_t has_vision, has_audio;
    int32_t mrope;     /* 1: rows have four positions each */
    int32_t non_causal; /* 1: attention among the rows of an image is non-causal */
    int32_t max_rows;  /* in one chunk of a large square image */
} trio_projector_info;

int32_t trio_projector_get_info(const trio_projector *projector, trio_projector_info *info);

/* Makes a sequence of chunks of one image: rows, and text around and between them. Fails with TRIO_E_INVALID if the
 * projector cannot take it. `data` is width * height pixels of 3 bytes, red, green and blue, from the top left on. */
int32_t trio_media_open(trio_projector *projector, const uint8_t *data, int64_t n_bytes, int32_t width, int32_t height,
                        trio_media **media);
void trio_media_free(trio_media *media); /* not while it is being encoded */

typedef struct trio_chunk_info {
    int32_t is_text;
    int32_t n_rows;      /* or tokens */
    int32_t n_positions; /* by which it moves the position on; with M-RoPE fewer than rows */
    int32_t non_causal;
} trio_chunk_info;

int32_t trio_media_count(const trio_media *media);
int32_t trio_media_get_chunk(const trio_media *media, int32_t index, trio_chunk_info *info);
int32_t trio_media_tokens(const trio_media *media, int32_t index, int32_t *tokens, int32_t size);

/* The positions of a chunk of rows, laid out as in a batch, for a chunk at position 0. For a chunk further on, add its
 * position to all of them, except to the last of four arrays. */
int32_t trio_media_positions(const trio_media *media, int32_t index, int32_t *positions, int32_t size);

/* Computes a chunk of rows. Writes n_rows * n_embd floats to `rows`, which has room for `size`. A projector computes
 * one chunk at a time; calls for others wait. */
int32_t trio_media_encode(trio_media *media, int32_t index, float *rows, int64_t size);

/* Makes every trio_media_encode() of this image return TRIO_E_CANCELLED, whether it waits, runs or comes later. */
void trio_media_cancel(trio_media *media);

/* cdef: end */

#ifdef __cplusplus
}
#endif
#endif
