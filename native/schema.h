// JSON schemas: which tokens may come next, so that the text becomes a value of the schema. For sampler.cpp.
#pragma once

#include "internal.h"

struct LlgMatcher;
struct LlgTokenizer;

namespace trio {

struct MatcherDeleter {
    void operator()(LlgMatcher *matcher) const noexcept;
};
using MatcherPtr = std::unique_ptr<LlgMatcher, MatcherDeleter>;

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
    explicit SchemaMatcher(const trio_schema &schema);
    // Copies the logits of the tokens that may come next, and writes negative infinity for all others. Throws Failure
    // with TRIO_E_GRAMMAR if that would cost too much.
    void mask(const float *logits, float *masked);
    void accept(int32_t token);
    bool ended() const { return ended_; } // nothing may follow

private:
    [[noreturn]] void fail();

    MatcherPtr native_;
    int32_t n_vocab_;
    std::vector<uint32_t> allowed_; // a bit for each token
    bool ended_ = false;
};

} // namespace trio

// A compiled schema. Samplers have copies of its matcher.
struct trio_schema {
    trio::ModelReference model;
    trio::MatcherPtr matcher;
};
