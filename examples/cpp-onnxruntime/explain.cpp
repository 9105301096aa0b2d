// Explain a photo with an exported file and ONNX Runtime: explain MODEL PHOTO CLASS OVERLAY.png [HEATMAP.f32]
#define STB_IMAGE_IMPLEMENTATION
#define STB_IMAGE_WRITE_IMPLEMENTATION
#include <onnxruntime_cxx_api.h>
#include <stb/stb_image.h>
#include <stb/stb_image_write.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <memory>
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

    Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "explain");
    Ort::Session session(env, argv[1], Ort::SessionOptions{});
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    const std::array<std::int64_t, 4> picture_shape{1, height, width, 3};
    const std::array<std::int64_t, 2> target_shape{1, 1};
    std::int64_t target = std::stoll(argv[3]);  // -1: the top class
    std::array<Ort::Value, 2> inputs{
        Ort::Value::CreateTensor<std::uint8_t>(memory, pixels.get(), std::size_t(width) * height * 3,
                                               picture_shape.data(), picture_shape.size()),
        Ort::Value::CreateTensor<std::int64_t>(memory, &target, 1, target_shape.data(), target_shape.size())};
    const std::array input_names{"pictures", "target"};
    const std::array output_names{"logits", "targets", "heatmaps", "overlays"};
    const auto outputs = session.Run(Ort::RunOptions{}, input_names.data(), inputs.data(), inputs.size(),
                                     output_names.data(), output_names.size());

    const std::int64_t explained = *outputs[1].GetTensorData<std::int64_t>();
    if (explained < 0) throw std::runtime_error(std::string(argv[1]) + " has no class " + argv[3]);
    std::printf("class %lld, score %.4f\n", static_cast<long long>(explained),
                outputs[0].GetTensorData<float>()[explained]);
    const auto shape = outputs[3].GetTensorTypeAndShapeInfo().GetShape();  // (1,1,H,W,3)
    const int rows = int(shape[2]), columns = int(shape[3]);
    if (!stbi_write_png(argv[4], columns, rows, 3, outputs[3].GetTensorData<std::uint8_t>(), columns * 3))
        throw std::runtime_error(std::string(argv[4]) + ": cannot be written");
    if (argc > 5)
        std::ofstream(argv[5], std::ios::binary)
            .write(reinterpret_cast<const char*>(outputs[2].GetTensorData<float>()), 4L * rows * columns);
    return 0;
} catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
