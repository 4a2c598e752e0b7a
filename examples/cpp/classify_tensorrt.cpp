// Classify a picture with a bundle for TensorRT 10:
//
//   python examples/unpack.py digits-trt-fp16.zip digits
//   classify_tensorrt digits picture.pgm
//
// A plan is machine code for the GPU: examples/unpack.py has checked its hash, and you should know who made it.
#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <exception>
#include <iterator>
#include <memory>

#include "model_files.hpp"

namespace {

class Logger : public nvinfer1::ILogger {
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kERROR) std::fprintf(stderr, "%s\n", message);
  }
};

void check(cudaError_t code) {
  if (code != cudaSuccess) throw std::runtime_error(cudaGetErrorString(code));
}

// Device memory that is freed with its owner.
class Buffer {
 public:
  explicit Buffer(std::size_t bytes) { check(cudaMalloc(&data_, bytes)); }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

std::vector<char> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace

int main(int count, char** arguments) try {
  if (count != 3) {
    std::fprintf(stderr, "usage: %s FOLDER PICTURE.pgm|PICTURE.ppm\n", arguments[0]);
    return 2;
  }
  const std::string folder = arguments[1];
  const Model model = read_model(folder);
  const std::vector<float> values = read_picture(arguments[2], model);

  Logger logger;
  const std::vector<char> plan = read_file(folder + "/" + model.graph);
  const std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(logger));
  const std::unique_ptr<nvinfer1::ICudaEngine> engine(runtime->deserializeCudaEngine(plan.data(), plan.size()));
  if (!engine) throw std::runtime_error(model.graph + " was built for another GPU or another TensorRT");
  const std::unique_ptr<nvinfer1::IExecutionContext> context(engine->createExecutionContext());

  const int channels = static_cast<int>(model.shape[0]), height = static_cast<int>(model.shape[1]),
            width = static_cast<int>(model.shape[2]);
  if (!context->setInputShape("image", nvinfer1::Dims4{1, channels, height, width}))
    throw std::runtime_error("the engine does not take one picture of this size");
  const nvinfer1::Dims row = context->getTensorShape("logits");
  std::vector<float> logits(static_cast<std::size_t>(row.d[row.nbDims - 1]));
  const Buffer image(values.size() * sizeof(float)), output(logits.size() * sizeof(float));
  context->setTensorAddress("image", image.data());
  context->setTensorAddress("logits", output.data());

  cudaStream_t stream = nullptr;
  check(cudaStreamCreate(&stream));
  const double milliseconds = median_milliseconds([&] {
    check(cudaMemcpyAsync(image.data(), values.data(), values.size() * sizeof(float), cudaMemcpyHostToDevice, stream));
    if (!context->enqueueV3(stream)) throw std::runtime_error("the engine failed");
    check(cudaMemcpyAsync(logits.data(), output.data(), logits.size() * sizeof(float), cudaMemcpyDeviceToHost, stream));
    check(cudaStreamSynchronize(stream));
  });
  print_labels(logits, model);
  std::printf("%.3f ms\n", milliseconds);
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 1;
}
