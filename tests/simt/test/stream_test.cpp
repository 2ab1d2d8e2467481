#include <stdexcept>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "device_array.h"

namespace simt {
namespace {

/// A stream that waits for no other.
class Stream {
 public:
  explicit Stream(unsigned flags = cudaStreamNonBlocking) { cudaStreamCreateWithFlags(&stream_, flags); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

class Event {
 public:
  explicit Event(unsigned flags = cudaEventDisableTiming) { cudaEventCreateWithFlags(&event_, flags); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  operator cudaEvent_t() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

/// One int in pinned memory.
class Pinned {
 public:
  explicit Pinned(int value) {
    cudaHostAlloc(&value_, sizeof(int), cudaHostAllocDefault);
    *value_ = value;
  }
  ~Pinned() { cudaFreeHost(value_); }
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;
  int* data() const { return value_; }
  int& operator*() const { return *value_; }

 private:
  int* value_ = nullptr;
};

void copy_in(const DeviceArray<int>& to, const int* from, cudaStream_t stream) {
  ASSERT_EQ(cudaMemcpyAsync(to.data(), from, sizeof(int), cudaMemcpyHostToDevice, stream), cudaSuccess);
}

void copy_out(const int* to, const DeviceArray<int>& from, cudaStream_t stream) {
  ASSERT_EQ(cudaMemcpyAsync(const_cast<int*>(to), from.data(), sizeof(int), cudaMemcpyDeviceToHost, stream),
            cudaSuccess);
}

__global__ void multiply(int* value, int factor) { *value *= factor; }

void multiply_on(cudaStream_t stream, const DeviceArray<int>& value, int factor) {
  cudaLaunchConfig_t config{};
  config.stream = stream;
  ASSERT_EQ(cudaLaunchKernelEx(&config, multiply, value.data(), +factor), cudaSuccess);
}

TEST(Stream, PinnedMemoryIsReadWhenTheCopyIsDone) {
  const Stream stream;
  const DeviceArray<int> value(1);
  const Pinned from(1);
  const Pinned to(0);
  copy_in(value, from.data(), stream);
  copy_out(to.data(), value, stream);
  *from = 2;  // a mistake, which shows
  ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  EXPECT_EQ(*to, 2);
}

TEST(Stream, PageableMemoryIsReadAtTheCall) {
  const Stream stream;
  const DeviceArray<int> value(1);
  int from = 1;
  int to = 0;
  copy_in(value, &from, stream);
  from = 2;
  copy_out(&to, value, stream);  // waits
  EXPECT_EQ(to, 1);
}

TEST(Stream, NothingIsThereBeforeSomebodyWaits) {
  const Stream stream;
  const DeviceArray<int> value(1);
  const Pinned from(3);
  const Pinned to(-1);
  copy_in(value, from.data(), stream);
  multiply_on(stream, value, 5);
  copy_out(to.data(), value, stream);
  EXPECT_EQ(*to, -1);
  EXPECT_EQ(cudaStreamQuery(stream), cudaErrorNotReady);
  EXPECT_EQ(cudaStreamQuery(stream), cudaSuccess);
  EXPECT_EQ(*to, 15);
  EXPECT_EQ(cudaGetLastError(), cudaErrorNotReady);
}

TEST(Stream, OnlyTheStreamThatIsWaitedForWorks) {
  const Stream one;
  const Stream two;
  const Pinned from(1);
  const Pinned to_one(0);
  const Pinned to_two(0);
  const DeviceArray<int> value(1);
  cudaMemset(value.data(), 0, 4);
  cudaDeviceSynchronize();
  copy_in(value, from.data(), one);
  copy_out(to_one.data(), value, one);
  cudaMemcpyAsync(to_two.data(), from.data(), 4, cudaMemcpyHostToHost, two);
  ASSERT_EQ(cudaStreamSynchronize(two), cudaSuccess);
  EXPECT_EQ(*to_one, 0);
  EXPECT_EQ(*to_two, 1);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(*to_one, 1);
}

TEST(Stream, AStreamWaitsForAnEventOfAnother) {
  const Stream producer;
  const Stream consumer;
  const Event produced;
  const DeviceArray<int> value(1);
  const Pinned from(3);
  const Pinned to(0);
  copy_in(value, from.data(), producer);
  ASSERT_EQ(cudaEventRecord(produced, producer), cudaSuccess);
  multiply_on(producer, value, 100);  // after the event: not waited for
  ASSERT_EQ(cudaStreamWaitEvent(consumer, produced), cudaSuccess);
  copy_out(to.data(), value, consumer);
  ASSERT_EQ(cudaStreamSynchronize(consumer), cudaSuccess);
  EXPECT_EQ(*to, 3);
}

TEST(Stream, WithoutTheEventTheOtherStreamsWorkIsMissing) {
  const Stream producer;
  const Stream consumer;
  const DeviceArray<int> value(1);
  const Pinned from(3);
  const Pinned to(0);
  copy_in(value, from.data(), producer);
  copy_out(to.data(), value, consumer);
  ASSERT_EQ(cudaStreamSynchronize(consumer), cudaSuccess);
  EXPECT_EQ(*to, -1);  // all bits set
}

TEST(Stream, TwoStreamsWaitForEachOtherInTurns) {
  const Stream streams[2];
  const Event events[2];
  const DeviceArray<int> value(std::vector<int>{1});
  const int factors[] = {2, 3, 5, 7};
  for (int turn = 0; turn < 4; ++turn) {
    const cudaStream_t now = streams[turn % 2];
    ASSERT_EQ(cudaStreamWaitEvent(now, events[(turn + 1) % 2]), cudaSuccess);
    multiply_on(now, value, factors[turn]);
    ASSERT_EQ(cudaEventRecord(events[turn % 2], now), cudaSuccess);
  }
  ASSERT_EQ(cudaStreamSynchronize(streams[1]), cudaSuccess);
  EXPECT_EQ(value.on_host()[0], 210);
}

TEST(Stream, BlockingStreamsAndTheDefaultStreamWaitForEachOther) {
  const Stream blocking(cudaStreamDefault);
  const DeviceArray<int> value(std::vector<int>{1});
  multiply_on(blocking, value, 2);
  ASSERT_EQ(cudaMemsetAsync(value.data(), 0, 1, nullptr), cudaSuccess);
  multiply_on(blocking, value, 9);
  EXPECT_EQ(value.on_host()[0], 0);
}

TEST(Stream, ADestroyedStreamIsNoStream) {
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreate(&stream), cudaSuccess);
  ASSERT_EQ(cudaStreamDestroy(stream), cudaSuccess);
  EXPECT_EQ(cudaStreamSynchronize(stream), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaErrorInvalidResourceHandle);
  cudaGetLastError();
}

TEST(Event, IsDoneOnceSomebodyWaited) {
  const Stream stream;
  const Event event;
  EXPECT_EQ(cudaEventQuery(event), cudaSuccess);  // never recorded
  const DeviceArray<int> value(std::vector<int>{1});
  multiply_on(stream, value, 2);
  ASSERT_EQ(cudaEventRecord(event, stream), cudaSuccess);
  multiply_on(stream, value, 3);
  EXPECT_EQ(cudaEventQuery(event), cudaErrorNotReady);
  EXPECT_EQ(cudaEventQuery(event), cudaSuccess);
  EXPECT_EQ(*value.data(), 2);
  ASSERT_EQ(cudaEventRecord(event, stream), cudaSuccess);
  ASSERT_EQ(cudaEventSynchronize(event), cudaSuccess);
  EXPECT_EQ(*value.data(), 6);
  cudaGetLastError();
}

TEST(Event, MeasuresTime) {
  const Stream stream;
  const Event start(cudaEventDefault);
  const Event end(cudaEventDefault);
  const Event untimed;
  ASSERT_EQ(cudaEventRecord(start, stream), cudaSuccess);
  ASSERT_EQ(cudaEventRecord(end, stream), cudaSuccess);
  float milliseconds = -1;
  EXPECT_EQ(cudaEventElapsedTime(&milliseconds, start, end), cudaErrorNotReady);
  ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  EXPECT_EQ(cudaEventElapsedTime(&milliseconds, start, end), cudaSuccess);
  EXPECT_GE(milliseconds, 0);
  EXPECT_EQ(cudaEventElapsedTime(&milliseconds, start, untimed), cudaErrorInvalidResourceHandle);
  cudaGetLastError();
}

__global__ void fail() { throw std::runtime_error("on purpose"); }

TEST(Stream, WhoWaitsGetsTheKernelsFailureOnce) {
  const Stream stream;
  cudaLaunchConfig_t config{};
  config.stream = stream;
  ASSERT_EQ(cudaLaunchKernelEx(&config, fail), cudaSuccess);
  EXPECT_THROW(cudaStreamSynchronize(stream), std::logic_error);
  EXPECT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
}

}  // namespace
}  // namespace simt
