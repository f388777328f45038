// JSON schemas: which tokens may come next, so that the text becomes a value of the schema. For sampler.cpp.
#pragma once

#include "internal.h"

struct LlgCancellationHandle;
struct LlgMatcher;
struct LlgTokenizer;

namespace trio {

struct MatcherDeleter {
    void operator()(LlgMatcher *matcher) const noexcept;
};
using MatcherPtr = std::unique_ptr<LlgMatcher, MatcherDeleter>;

struct CancellationDeleter {
    void operator()(LlgCancellationHandle *handle) const noexcept;
};
using CancellationPtr = std::unique_ptr<LlgCancellationHandle, CancellationDeleter>;

// The vocabulary of one model, as llguidance keeps it.
class SchemaVocabulary {
public:
    explicit SchemaVocabulary(const trio_model &model);
    ~SchemaVocabulary();
    SchemaVocabulary(const SchemaVocabulary &) = delete;
    SchemaVocabulary &operator=(const SchemaVocabulary &) = delete;
    const LlgTokenizer *native() const { return native_; }

private:
    LlgTokenizer *native_ = nullptr;
};

// How far one text has come in a schema.
class SchemaMatcher {
public:
    SchemaMatcher(MatcherPtr native, int32_t n_vocab);
    explicit SchemaMatcher(const trio_schema &schema);
    // Finds the tokens that may come next. Throws Failure with TRIO_E_GRAMMAR if that would cost too much.
    void find_allowed();
    // So few that a list of them is shorter than the whole vocabulary with all others forbidden.
    bool allows_few() const { return n_allowed_ <= n_vocab_ / FEW; }
    // Copies the logits of the tokens that may come next. All others become negative infinity or, if few are allowed,
    // stay as they are.
    void mask(const float *logits, float *masked) const;
    // Lists the tokens that may come next. Returns their number.
    size_t list(const float *logits, llama_token_data *candidates) const;
    void accept(int32_t token);
    bool ended() const { return ended_; } // nothing may follow
    // Finds the tokens that may come first. Returns the matcher, which knows them from now on.
    MatcherPtr begin(double seconds);

private:
    static constexpr int32_t FEW = 8;
    void find_allowed(double seconds);
    template <class Visit> void visit_allowed(Visit &&visit) const;
    template <class Call> void run(double seconds, Call &&call); // throws Failure

    MatcherPtr native_;
    CancellationPtr cancellation_;
    int32_t n_vocab_;
    int32_t n_slow_ = 0;
    int32_t n_allowed_ = 0;
    std::vector<uint32_t> allowed_; // a bit for each token
    bool ended_ = false;
};

} // namespace trio

// A compiled schema. Samplers have copies of its matcher.
struct trio_schema {
    trio::ModelReference model;
    trio::MatcherPtr matcher;
};
