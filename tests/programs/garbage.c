/*
 * garbage SOCKET: a hostile local user. Connects to a node daemon again and again, and sends
 * packets of reproducible nonsense, some of which begin like messages, until it is killed; says
 * `ok` when the daemon has ended the first connection.
 */
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { LONGEST = 64, PACKETS = 8, LIFE = 200 /* seconds */ };

static uint64_t state;

/* splitmix64 */
static uint64_t random_next(void)
{
    uint64_t z = state += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

static void annoy(const struct sockaddr_un *address)
{
    int connection = socket(AF_UNIX, SOCK_SEQPACKET, 0);
    if (connect(connection, (const struct sockaddr *)address, sizeof *address) != 0) {
        perror("garbage: connect");
        _exit(1);
    }
    for (int k = 0; k < PACKETS; k++) {
        unsigned char packet[LONGEST] = {0, 1}; /* half of them begin with a Hello's bytes */
        size_t from = random_next() % 2 * 2, length = random_next() % LONGEST;
        unsigned bound = random_next() % 2 ? 256 : 8;
        for (size_t i = from; i < length; i++)
            packet[i] = (unsigned char)(random_next() % bound);
        if (send(connection, packet, length, MSG_NOSIGNAL) == -1)
            break;
    }
    close(connection);
}

int main(int argc, char **argv)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (argc != 2 || strlen(argv[1]) >= sizeof address.sun_path)
        return 2;
    strcpy(address.sun_path, argv[1]);
    alarm(LIFE);
    annoy(&address);
    puts("ok");
    fflush(stdout);
    for (;;)
        annoy(&address);
}
