// Explain a photo with an exported file and OpenVINO: explain MODEL PHOTO CLASS OVERLAY.png [HEATMAP.f32]
#define STB_IMAGE_IMPLEMENTATION
#define STB_IMAGE_WRITE_IMPLEMENTATION
#include <stb/stb_image.h>
#include <stb/stb_image_write.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <memory>
#include <openvino/openvino.hpp>
#include <stdexcept>
#include <string>

int main(int argc, char** argv) try {
    if (argc < 5) {
        std::fprintf(stderr, "usage: %s MODEL PHOTO CLASS OVERLAY.png [HEATMAP.f32]\n", argv[0]);
        return 2;
    }
    int width = 0, height = 0, channels = 0;
    const std::unique_ptr<stbi_uc, decltype(&stbi_image_free)> pixels(
        stbi_load(argv[2], &width, &height, &channels, 3), &stbi_image_free);
    if (!pixels) throw std::runtime_error(std::string(argv[2]) + ": " + stbi_failure_reason());

    ov::Core core;
    const auto precision = ov::hint::inference_precision(ov::element::f32);  // OpenVINO may lower it otherwise
    auto request = core.compile_model(argv[1], "CPU", precision).create_infer_request();
    std::int64_t target = std::stoll(argv[3]);  // -1: the top class
    request.set_tensor("pictures", ov::Tensor(ov::element::u8, {1, std::size_t(height), std::size_t(width), 3},
                                              pixels.get()));
    request.set_tensor("target", ov::Tensor(ov::element::i64, {1, 1}, &target));
    request.infer();

    const auto explained = request.get_tensor("targets").data<std::int64_t>()[0];
    if (explained < 0) throw std::runtime_error(std::string(argv[1]) + " has no class " + argv[3]);
    std::printf("class %lld, score %.4f\n", static_cast<long long>(explained),
                request.get_tensor("logits").data<float>()[explained]);
    const auto overlays = request.get_tensor("overlays");  // (1,1,H,W,3)
    const int rows = int(overlays.get_shape()[2]), columns = int(overlays.get_shape()[3]);
    if (!stbi_write_png(argv[4], columns, rows, 3, overlays.data<std::uint8_t>(), columns * 3))
        throw std::runtime_error(std::string(argv[4]) + ": cannot be written");
    if (argc > 5)
        std::ofstream(argv[5], std::ios::binary)
            .write(reinterpret_cast<const char*>(request.get_tensor("heatmaps").data<float>()), 4L * rows * columns);
    return 0;
} catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
