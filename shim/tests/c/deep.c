/* A call from a library that is loaded with RTLD_DEEPBIND, found by the RUNPATH of who loads it.
   Built with -DPLUGIN it is that library. */
#define _GNU_SOURCE
#include "fake.h"

#include <dlfcn.h>

#ifdef PLUGIN
int make(void);
int make(void) { return shmget(6, SIZE, IPC_CREAT | 0600); }
#else
int main(void)
{
    void *plugin = dlopen(NAME, RTLD_NOW | RTLD_DEEPBIND);
    CHECK(plugin);
    int (*make)(void) = (int (*)(void))dlsym(plugin, "make");
    CHECK(make && make() == 6);
    CHECK(dlmopen(LM_ID_BASE, NAME, RTLD_NOW | RTLD_DEEPBIND | RTLD_NOLOAD) == plugin);
    CHECK(!dlopen("no such library", RTLD_NOW) && strstr(dlerror(), "no such library"));
    return 0;
}
#endif
