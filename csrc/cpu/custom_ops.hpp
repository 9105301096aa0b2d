// Layers that the nodes of an ONNX Runtime session run.
//
// A node of the op "Convolution" or "Dense" of the domain "fastcam" names a published layer by its number: the weights
// reach the op without passing through the model. RegisterCustomOps, which this library exports, adds the ops to a
// session.
#pragma once

#include <cstdint>
#include <memory>

#include "convolution.hpp"
#include "dense.hpp"

namespace fastcam {

// A layer, Convolution or Dense, that nodes find by its number while this object lives. A session that has opened keeps
// its own reference.
template <class Layer>
class Published {
public:
    explicit Published(Layer layer);
    ~Published();
    Published(const Published&) = delete;
    Published& operator=(const Published&) = delete;

    std::int64_t number() const { return number_; }

private:
    std::int64_t number_;
};

extern template class Published<Convolution>;
extern template class Published<Dense>;

}  // namespace fastcam
