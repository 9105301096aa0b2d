// Convolutions that the nodes of an ONNX Runtime session run.
//
// A node of the op "Convolution" of the domain "fastcam" names a published convolution by its number: the weights reach
// the op without passing through the model. RegisterCustomOps, which this library exports, adds the op to a session.
#pragma once

#include <cstdint>
#include <memory>

#include "convolution.hpp"

namespace fastcam {

// A convolution that nodes find by its number while this object lives. A session that has opened keeps its own share.
class PublishedConvolution {
public:
    explicit PublishedConvolution(Convolution convolution);
    ~PublishedConvolution();
    PublishedConvolution(const PublishedConvolution&) = delete;
    PublishedConvolution& operator=(const PublishedConvolution&) = delete;

    std::int64_t number() const { return number_; }
    const Convolution& convolution() const { return *convolution_; }

private:
    std::shared_ptr<const Convolution> convolution_;
    std::int64_t number_;
};

}  // namespace fastcam
