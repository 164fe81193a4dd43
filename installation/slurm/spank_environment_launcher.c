/*
 * Starts RUNNER edf run EDF -- COMMAND ARG... for the plugin beside it. Before Slurm 24.11 a plugin
 * can replace a task's argv[0], by this program, and cannot put words in front. RUNNER, EDF and
 * COMMAND come in variables, which the task does not see; ARG... and all else pass as they are.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static char *take(const char *variable)
{
    const char *value = getenv(variable);

    if (!value) {
        fprintf(stderr, "error: %s is not set: this program is started by Slurm alone\n", variable);
        exit(1);
    }
    char *copy = strdup(value);
    unsetenv(variable);
    return copy;
}

int main(int argc, char **argv)
{
    char *runner = take("POST_TRAINING_SPANK_RUNNER");
    char *edf = take("SLURM_POST_TRAINING_EDF");
    char *command = take("POST_TRAINING_SPANK_COMMAND");
    char *front[] = {runner, "edf", "run", edf, "--", command};
    char *words[6 + argc]; /* argv[0] makes room for the NULL */

    memcpy(words, front, sizeof front);
    memcpy(words + 6, argv + 1, argc * sizeof *words);
    execv(runner, words);
    fprintf(stderr, "error: %s: %s\n", runner, strerror(errno));
    return 1;
}
