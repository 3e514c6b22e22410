// The native tests: `driver match merge ...` runs these, `driver` all of them.
#include "check.h"

int main(int count, char** names) {
  static const struct {
    const char* name;
    void (*run)();
  } all[] = {{"match", test_match},         {"mean", test_mean},       {"merge", test_merge}, {"restore", test_restore},
             {"attention", test_attention}, {"linear", test_linear},   {"threads", test_threads}, {"fork", test_fork}};
  const char* wish = getenv("ELISION_ISA");
  if (wish != nullptr) CHECK(strcmp(wish, elision_variant()) == 0);
  int done = 0;
  for (const auto& test : all) {
    bool asked = count == 1;
    for (int i = 1; i < count; ++i) asked = asked || strcmp(names[i], test.name) == 0;
    if (!asked) continue;
    test.run();
    printf("%s %s\n", elision_variant(), test.name);
    ++done;
  }
  CHECK(count == 1 || done == count - 1);
  return 0;
}
