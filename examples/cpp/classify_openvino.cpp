// Classify a picture with a bundle for OpenVINO:
//
//   python examples/unpack.py digits-openvino-fp32.zip digits
//   classify_openvino digits picture.pgm
#include <openvino/openvino.hpp>

#include <cstdio>
#include <cstring>
#include <exception>

#include "model_files.hpp"

int main(int count, char** arguments) try {
  if (count != 3) {
    std::fprintf(stderr, "usage: %s FOLDER PICTURE.pgm|PICTURE.ppm\n", arguments[0]);
    return 2;
  }
  const std::string folder = arguments[1];
  const Model model = read_model(folder);
  const std::vector<float> values = read_picture(arguments[2], model);

  ov::Core core;
  ov::CompiledModel compiled = core.compile_model(folder + "/" + model.graph, "CPU",
                                                  ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY),
                                                  ov::hint::inference_precision(ov::element::f32));
  ov::InferRequest request = compiled.create_infer_request();
  ov::Tensor input(ov::element::f32, {1, model.shape[0], model.shape[1], model.shape[2]});
  std::memcpy(input.data<float>(), values.data(), values.size() * sizeof(float));
  request.set_input_tensor(input);
  const double milliseconds = median_milliseconds([&] { request.infer(); });

  const ov::Tensor output = request.get_output_tensor(0);
  const float* logits = output.data<const float>();
  print_labels({logits, logits + output.get_size()}, model);
  std::printf("%.3f ms\n", milliseconds);
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 1;
}
