// JSON schemas, by llguidance (https://github.com/guidance-ai/llguidance).
//
// llguidance comes in a Python wheel, so nothing here is linked with it. trio_runner/llama/schema.py loads it, and
// passes pointers to its functions to trio_schema_use(). Its C structs are declared here once more. They fit only the
// version that schema.py asks for: LlgConstraintInit has no field for its size, so another version may have another
// layout.

#include "schema.h"
#include "schema_watch.h"

#include <algorithm>
#include <bitset>
#include <cstring>
#include <limits>

using namespace trio;

// ---- llguidance's C interface --------------------------------------------------------------------------------------

namespace {

struct LlgParserLimits {
    size_t max_items_in_row;     // branches of the grammar at one place
    uint64_t initial_lexer_fuel; // work for the regular expressions of a schema; 50,000 take a millisecond
    uint64_t step_lexer_fuel;    // work on regular expressions for one mask; 14,000 take a millisecond
    size_t step_max_items;       // items of the parser for one mask; 20,000 take a millisecond
    size_t max_lexer_states;     // one or two kB each
    size_t max_grammar_size;     // symbols
    bool precompute_large_lexemes;
    bool verbose_errors;
};

struct LlgConstraintInit {
    const LlgTokenizer *tokenizer;
    uint32_t log_buffer_level;
    uint32_t log_stderr_level;
    bool ff_tokens_ok;
    bool backtrack_ok;
    LlgParserLimits limits;
};

struct LlgTokenizerInitV2 {
    size_t struct_size;
    uint32_t vocab_size;
    uint32_t tok_eos;
    const uint32_t *token_lens;
    const uint8_t *token_bytes;
    const char *tokenizer_json;
    bool tokenize_assumes_string;
    size_t (*tokenize_fn)(const void *, const uint8_t *, size_t, uint32_t *, size_t);
    bool use_approximate_greedy_tokenize_fn;
    const void *tokenize_user_data;
    const char *const *slices;
    const uint32_t *tok_eos_extra;
    uint32_t tok_eos_extra_count;
};

struct Functions {
    LlgTokenizer *(*new_tokenizer_v2)(const LlgTokenizerInitV2 *, char *, size_t);
    void (*free_tokenizer)(LlgTokenizer *);
    LlgMatcher *(*new_matcher)(const LlgConstraintInit *, const char *, const char *);
    LlgMatcher *(*clone_matcher)(const LlgMatcher *);
    void (*free_matcher)(LlgMatcher *);
    int32_t (*compute_mask_into)(LlgMatcher *, uint32_t *, size_t);
    int32_t (*consume_token)(LlgMatcher *, uint32_t);
    bool (*is_stopped)(const LlgMatcher *);
    const char *(*get_error)(LlgMatcher *);
    LlgCancellationHandle *(*get_cancellation_handle)(LlgMatcher *);
    void (*cancel)(const LlgCancellationHandle *);
    void (*free_cancellation_handle)(LlgCancellationHandle *);
};

Functions functions;
std::mutex functions_mutex;
std::atomic<bool> functions_known{false};

constexpr uint32_t NO_TOKEN = std::numeric_limits<uint32_t>::max();
constexpr uint8_t SPECIAL = 0xFF; // the first byte of a token that is no text
constexpr uint32_t ALL = std::numeric_limits<uint32_t>::max();
constexpr int32_t BITS = 32;
constexpr int32_t BYTE = 8;
constexpr float NEGATIVE_INFINITY = -std::numeric_limits<float>::infinity();
constexpr size_t MAX_MESSAGE_BYTES = 400;

// CPU seconds of one call. Masks take microseconds, and a few milliseconds where many things are possible for the first
// time.
constexpr double MAX_SECONDS = 0.05;
constexpr double MAX_FIRST_SECONDS = 1.0; // on a helper thread
constexpr double SLOW_SECONDS = 0.01;
constexpr int32_t MAX_SLOW_CALLS = 20;

constexpr LlgParserLimits LIMITS = {
    /* max_items_in_row */ 2000,
    /* initial_lexer_fuel */ 1000000,
    /* step_lexer_fuel */ 100000,
    /* step_max_items */ 50000,
    /* max_lexer_states */ 20000,
    /* max_grammar_size */ 200000,
    /* precompute_large_lexemes */ true,
    /* verbose_errors */ false,
};

// One line: the first, and what a parser of regular expressions says after showing where.
std::string short_message(const char *text) {
    const std::string message = text == nullptr ? "no reason was given" : text;
    std::string line = message.substr(0, message.find('\n'));
    constexpr char reason[] = "\nerror: ";
    const size_t at = message.rfind(reason);
    if (at != std::string::npos) line += ' ' + message.substr(at + sizeof reason - 1);
    line.resize(std::min({line.size(), line.find('\n'), MAX_MESSAGE_BYTES}));
    return line;
}

int32_t count_bits(uint32_t bits) {
    return int32_t(std::bitset<BITS>(bits).count());
}

// For each byte of a mask, what to do with the eight logits that it stands for. Compilers make vector instructions of
// the loop.
class ByteMasks {
public:
    ByteMasks() {
        for (uint32_t byte = 0; byte < 256; ++byte) {
            for (int32_t bit = 0; bit < BYTE; ++bit)
                keep_[byte][bit] = (byte >> bit & 1) != 0 ? ALL : 0;
        }
    }

    void apply(uint32_t byte, const float *logits, float *masked, int32_t n) const {
        if (n < BYTE) {
            for (int32_t i = 0; i < n; ++i)
                masked[i] = keep_[byte][i] != 0 ? logits[i] : NEGATIVE_INFINITY;
            return;
        }
        uint32_t bits[BYTE], never;
        std::memcpy(bits, logits, sizeof bits);
        std::memcpy(&never, &NEGATIVE_INFINITY, sizeof never);
        for (int32_t i = 0; i < BYTE; ++i)
            bits[i] = (bits[i] & keep_[byte][i]) | (never & ~keep_[byte][i]);
        std::memcpy(masked, bits, sizeof bits);
    }

private:
    uint32_t keep_[256][8];
};

bool is_special(const llama_vocab *vocab, int32_t token) {
    constexpr int special = LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_UNKNOWN | LLAMA_TOKEN_ATTR_UNUSED;
    return llama_vocab_is_eog(vocab, token) || (llama_vocab_get_attr(vocab, token) & special) != 0;
}

} // namespace

void MatcherDeleter::operator()(LlgMatcher *matcher) const noexcept {
    functions.free_matcher(matcher);
}

// ---- vocabularies --------------------------------------------------------------------------------------------------

SchemaVocabulary::SchemaVocabulary(const trio_model &model) {
    const int32_t n_vocab = model.info.n_vocab;
    std::string bytes;
    std::vector<uint32_t> lengths(static_cast<size_t>(n_vocab));
    std::vector<uint32_t> ends;
    for (int32_t token = 0; token < n_vocab; ++token) {
        const size_t before = bytes.size();
        if (is_special(model.vocab, token)) {
            const char *name = llama_vocab_get_text(model.vocab, token);
            bytes += char(SPECIAL);
            bytes += name == nullptr ? "" : name;
            if (llama_vocab_is_eog(model.vocab, token)) ends.push_back(uint32_t(token));
        } else {
            bytes += model.piece(token);
        }
        lengths[size_t(token)] = uint32_t(bytes.size() - before);
    }
    LlgTokenizerInitV2 init{};
    init.struct_size = sizeof init;
    init.vocab_size = uint32_t(n_vocab);
    init.tok_eos = ends.empty() ? NO_TOKEN : ends.front();
    init.token_lens = lengths.data();
    init.token_bytes = reinterpret_cast<const uint8_t *>(bytes.data());
    // The model chooses by itself how a text is cut into tokens: every cut of an allowed text is allowed.
    init.use_approximate_greedy_tokenize_fn = true;
    if (ends.size() > 1) {
        init.tok_eos_extra = ends.data() + 1;
        init.tok_eos_extra_count = uint32_t(ends.size() - 1);
    }
    char error[MAX_MESSAGE_BYTES] = "";
    native_ = functions.new_tokenizer_v2(&init, error, sizeof error);
    if (native_ == nullptr) throw Failure(TRIO_E_NATIVE, "llguidance: " + short_message(error));
}

SchemaVocabulary::~SchemaVocabulary() {
    functions.free_tokenizer(native_);
}

// ---- matchers ------------------------------------------------------------------------------------------------------

void CancellationDeleter::operator()(LlgCancellationHandle *handle) const noexcept {
    functions.free_cancellation_handle(handle);
}

SchemaMatcher::SchemaMatcher(MatcherPtr native, int32_t n_vocab)
    : native_(std::move(native)), cancellation_(functions.get_cancellation_handle(native_.get())), n_vocab_(n_vocab),
      allowed_(size_t(n_vocab + BITS - 1) / BITS) {}

SchemaMatcher::SchemaMatcher(const trio_schema &schema)
    : SchemaMatcher(MatcherPtr(functions.clone_matcher(schema.matcher.get())), schema.model->info.n_vocab) {}

template <class Call> void SchemaMatcher::run(double seconds, Call &&call) {
    const double started = thread_seconds();
    std::atomic<bool> stopped{false};
    int32_t code = 0;
    {
        const Watch watch(seconds, [&] {
            stopped = true;
            functions.cancel(cancellation_.get());
        });
        code = call();
    }
    const bool is_slow = thread_seconds() - started > SLOW_SECONDS;
    if (stopped || (is_slow && ++n_slow_ > MAX_SLOW_CALLS)) {
        throw Failure(TRIO_E_GRAMMAR, "the schema is too complex: it takes too long to find out what may come next");
    }
    if (code != 0) {
        throw Failure(TRIO_E_GRAMMAR,
                      "what may come next is not known: " + short_message(functions.get_error(native_.get())));
    }
}

void SchemaMatcher::find_allowed(double seconds) {
    const size_t n_bytes = allowed_.size() * sizeof allowed_[0];
    run(seconds, [&] { return functions.compute_mask_into(native_.get(), allowed_.data(), n_bytes); });
}

MatcherPtr SchemaMatcher::begin(double seconds) {
    find_allowed(seconds);
    return std::move(native_);
}

void SchemaMatcher::find_allowed() {
    find_allowed(MAX_SECONDS);
    n_allowed_ = 0;
    for (const uint32_t bits : allowed_)
        n_allowed_ += count_bits(bits);
}

template <class Visit> void SchemaMatcher::visit_allowed(Visit &&visit) const {
    for (size_t word = 0; word < allowed_.size(); ++word) {
        for (uint32_t bits = allowed_[word]; bits != 0; bits &= bits - 1) {
            const int32_t token = int32_t(word) * BITS + count_bits((bits & (0 - bits)) - 1); // of the lowest bit
            if (token < n_vocab_) visit(token);
        }
    }
}

void SchemaMatcher::mask(const float *logits, float *masked) const {
    if (allows_few()) {
        visit_allowed([&](int32_t token) { masked[token] = logits[token]; });
        return;
    }
    static const ByteMasks masks;
    for (int32_t begin = 0; begin < n_vocab_; begin += BYTE) {
        const uint32_t byte = allowed_[size_t(begin / BITS)] >> (begin % BITS) & 0xFF;
        masks.apply(byte, logits + begin, masked + begin, std::min(BYTE, n_vocab_ - begin));
    }
}

size_t SchemaMatcher::list(const float *logits, llama_token_data *candidates) const {
    size_t n = 0;
    visit_allowed([&](int32_t token) { candidates[n++] = {token, logits[token], 0.0f}; });
    return n;
}

void SchemaMatcher::accept(int32_t token) {
    run(MAX_SECONDS, [&] { return functions.consume_token(native_.get(), uint32_t(token)); });
    ended_ = functions.is_stopped(native_.get());
}

// ---- the C surface -------------------------------------------------------------------------------------------------

extern "C" {

int32_t trio_schema_use(const trio_schema_functions *given) {
    return guard([&] {
        check_pointer(given, "functions");
        static_assert(sizeof(trio_schema_functions) == sizeof(Functions), "a function is missing");
        void *const *pointers = &given->new_tokenizer_v2;
        for (size_t i = 0; i < sizeof(Functions) / sizeof(void *); ++i)
            check_pointer(pointers[i], "a function of llguidance");
        std::lock_guard<std::mutex> lock(functions_mutex);
        if (functions_known) return TRIO_OK;
        std::memcpy(&functions, given, sizeof functions);
        functions_known = true;
        return TRIO_OK;
    });
}

int32_t trio_schema_open(trio_model *model, const char *text, trio_schema **schema) {
    return guard([&] {
        check_pointer(model, "model");
        check_pointer(text, "text");
        *check_pointer(schema, "schema") = nullptr;
        check(functions_known, "trio_schema_use() was not called");
        check(model->info.has_vocab != 0, "the model has no vocabulary to apply a schema to");
        MatcherPtr matcher;
        // llguidance recurses with the schema and with the regular expressions in it.
        on_big_stack(std::strlen(text), [&] {
            LlgConstraintInit init{};
            init.tokenizer = model->schema_vocabulary().native();
            init.limits = LIMITS;
            matcher.reset(functions.new_matcher(&init, "json_schema", text));
            if (const char *error = functions.get_error(matcher.get())) {
                throw Failure(TRIO_E_GRAMMAR, short_message(error));
            }
            matcher = SchemaMatcher(std::move(matcher), model->info.n_vocab).begin(MAX_FIRST_SECONDS);
        });
        *schema = new trio_schema{ModelReference(model), std::move(matcher)};
        return TRIO_OK;
    });
}

void trio_schema_free(trio_schema *schema) {
    guard([&] {
        delete schema;
        return TRIO_OK;
    });
}

} // extern "C"

const SchemaVocabulary &trio_model::schema_vocabulary() {
    std::lock_guard<std::mutex> lock(schema_mutex);
    if (!schema_vocabulary_) schema_vocabulary_ = std::make_shared<SchemaVocabulary>(*this);
    return *schema_vocabulary_;
}
