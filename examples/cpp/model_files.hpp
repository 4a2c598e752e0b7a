// What both programs share: the facts of an unpacked bundle, a picture, and the labels of a row of logits.
#pragma once

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <fstream>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

// The lines of model.txt, which examples/unpack.py writes.
struct Model {
  std::string graph;
  std::vector<float> mean, std;
  std::vector<std::size_t> shape;  // channels, height, width
  std::vector<std::string> labels;
};

inline Model read_model(const std::string& folder) {
  std::ifstream file(folder + "/model.txt");
  if (!file) throw std::runtime_error("cannot read " + folder + "/model.txt: unpack the bundle with examples/unpack.py");
  Model model;
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string key;
    words >> key >> std::ws;
    if (key == "graph") std::getline(words, model.graph);
    if (key == "label") {
      std::string label;
      std::getline(words, label);
      model.labels.push_back(label);
    }
    if (key == "mean") for (float value; words >> value;) model.mean.push_back(value);
    if (key == "std") for (float value; words >> value;) model.std.push_back(value);
    if (key == "shape") for (std::size_t value; words >> value;) model.shape.push_back(value);
  }
  if (model.shape.size() != 3 || model.mean.size() != model.std.size())
    throw std::runtime_error(folder + "/model.txt is not that of a classifier");
  if (model.mean.empty()) model.mean = {0.0F}, model.std = {1.0F};
  return model;
}

// A binary PGM or PPM picture of the model's size as normalised values, channel by channel.
inline std::vector<float> read_picture(const std::string& path, const Model& model) {
  std::ifstream file(path, std::ios::binary);
  std::string kind;
  std::size_t width = 0, height = 0, largest = 0;
  file >> kind >> width >> height >> largest;
  file.get();
  const std::size_t channels = kind == "P5" ? 1 : 3;
  if (!file || (kind != "P5" && kind != "P6") || largest != 255)
    throw std::runtime_error(path + " is no 8-bit binary PGM or PPM picture");
  if (channels != model.shape[0] || height != model.shape[1] || width != model.shape[2])
    throw std::runtime_error(path + " has another size than the model takes: resize it");
  std::vector<unsigned char> bytes(channels * height * width);
  if (!file.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size())))
    throw std::runtime_error(path + " ends early");
  std::vector<float> values(bytes.size());
  for (std::size_t pixel = 0; pixel < height * width; ++pixel)
    for (std::size_t c = 0; c < channels; ++c) {
      const std::size_t k = c % model.mean.size();
      const float value = static_cast<float>(bytes[pixel * channels + c]) / 255.0F;
      values[c * height * width + pixel] = (value - model.mean[k]) / model.std[k];
    }
  return values;
}

inline void print_labels(const std::vector<float>& logits, const Model& model, std::size_t top = 3) {
  const float largest = *std::max_element(logits.begin(), logits.end());
  std::vector<double> weights(logits.size());
  std::transform(logits.begin(), logits.end(), weights.begin(), [&](float logit) { return std::exp(logit - largest); });
  const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
  std::vector<std::size_t> order(logits.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return weights[a] > weights[b]; });
  for (std::size_t rank = 0; rank < std::min(top, order.size()); ++rank) {
    const std::size_t k = order[rank];
    const std::string name = k < model.labels.size() ? model.labels[k] : std::to_string(k);
    std::printf("%s %.4f\n", name.c_str(), weights[k] / sum);
  }
}

// Median milliseconds of a call, behind a few that warm up.
template <typename Call>
double median_milliseconds(Call call, int rounds = 50) {
  std::vector<double> times;
  for (int round = -5; round < rounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    call();
    const std::chrono::duration<double, std::milli> spent = std::chrono::steady_clock::now() - start;
    if (round >= 0) times.push_back(spent.count());
  }
  std::nth_element(times.begin(), times.begin() + rounds / 2, times.end());
  return times[static_cast<std::size_t>(rounds / 2)];
}
