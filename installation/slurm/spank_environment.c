/*
 * --environment=EDF for srun, sbatch and salloc: tasks run inside the image that an Environment
 * Definition File names. --edf=EDF is the same: so Alps' engine of today and its successor call it.
 * What an EDF means is the runner's business alone:
 *
 *   where the user types  RUNNER edf resolve EDF prints the file's absolute path, or what is wrong
 *   on the way            EDF_VARIABLE carries that path in the job's environment
 *   on the node           each task's CMD ARG... becomes RUNNER edf run /abs/edf.toml -- CMD ARG...
 *
 * A task without EDF_VARIABLE is left alone; a task with it runs in the image or not at all.
 *
 * plugstack.conf:  required /path/spank_environment.so runner=/path/post-training launcher=/path/...
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <slurm/slurm.h>
#include <slurm/spank.h>

/* SLURM in front, or --export=NONE drops it. Slurm's own way for a plugin's options does not serve:
 * it carries what was typed, not what it resolved to, and sbatch --export=NONE loses it. */
#define EDF_VARIABLE "SLURM_POST_TRAINING_EDF"

SPANK_PLUGIN(environment, 1)

/* How the options are called, by their val. */
static const char *const option_names[] = {"environment", "edf"};
static char *requested; /* what was typed after --environment= or --edf=; NULL without */
static int requested_by;

/* Ends the process instead of returning an error: Slurm ignores the errors of a plugin listed as
 * `optional`, and the task would run on the host. Called in srun, sbatch and salloc (srun's
 * shepherd process gives back what was allocated), and in a task before its command starts. */
#define refuse(format, ...) \
    (slurm_error("--%s: " format, option_names[requested_by], ##__VA_ARGS__), _exit(1))

static const char *setting(const char *name, int ac, char **av)
{
    size_t length = strlen(name);

    for (int i = 0; i < ac; i++)
        if (!strncmp(av[i], name, length) && av[i][length] == '=' && av[i][length + 1] == '/')
            return av[i] + length + 1;
    refuse("plugstack.conf must give %s=/absolute/path", name);
    return NULL;
}

static int on_option(int val, const char *argument, int remote)
{
    if (!remote) {
        if (requested && requested_by != val && strcmp(requested, argument))
            refuse("--%s names another EDF: give one of the two", option_names[val]);
        free(requested);
        requested = strdup(argument);
        requested_by = val;
    }
    return 0;
}

static struct spank_option options[] = {
    {
        .name = "environment",
        .arginfo = "EDF",
        .usage = "run inside the image of this environment: path/to/it.toml, or a name in EDF_PATH",
        .has_arg = 1,
        .val = 0,
        .cb = on_option,
    },
    {
        .name = "edf",
        .arginfo = "EDF",
        .usage = "the same as --environment",
        .has_arg = 1,
        .val = 1,
        .cb = on_option,
    },
};

int slurm_spank_init(spank_t spank, int ac, char **av)
{
    spank_context_t context = spank_context();

    if (context != S_CTX_LOCAL && context != S_CTX_ALLOCATOR && context != S_CTX_REMOTE)
        return 0; /* slurmd itself and prologs have no options */
    for (int i = 0; i < 2; i++)
        if (spank_option_register(spank, &options[i]))
            return -1;
    return 0;
}

/* Puts what RUNNER edf resolve NAME prints into path; its messages go straight to the user. */
static void resolve(const char *runner, const char *name, char *path, size_t size)
{
    size_t length = 0;
    ssize_t count;
    int ends[2], status;
    pid_t child;

    if (pipe(ends) || (child = fork()) < 0)
        refuse("%s", strerror(errno));
    if (child == 0) {
        dup2(ends[1], STDOUT_FILENO);
        close(ends[0]);
        close(ends[1]);
        execl(runner, runner, "edf", "resolve", name, (char *)NULL);
        dprintf(STDERR_FILENO, "error: %s: %s\n", runner, strerror(errno));
        _exit(1);
    }
    close(ends[1]);
    while ((count = read(ends[0], path + length, size - 1 - length)) > 0)
        length += count;
    close(ends[0]);
    if (waitpid(child, &status, 0) < 0)
        refuse("%s: %s", runner, strerror(errno));
    if (WIFEXITED(status) && WEXITSTATUS(status))
        _exit(1); /* the runner has said why */
    path[length] = '\0';
    path[strcspn(path, "\n")] = '\0';
    if (!WIFEXITED(status) || path[0] != '/' || strlen(path) + 1 != length)
        refuse("%s edf resolve %s: did not print one absolute path", runner, name);
}

int slurm_spank_init_post_opt(spank_t spank, int ac, char **av)
{
    char path[4096], name[64]; /* PATH_MAX */

    if (!requested || spank_context() == S_CTX_REMOTE)
        return 0;
    resolve(setting("runner", ac, av), requested, path, sizeof path);
    setenv(EDF_VARIABLE, path, 1);
    /* Slurm hands salloc's and sbatch's option down to the srun inside, by this name and as it was
     * typed: a relative path would be looked up again, from wherever that srun is called. */
    snprintf(name, sizeof name, "_SLURM_SPANK_OPTION_environment_%s", option_names[requested_by]);
    if (spank_context() == S_CTX_ALLOCATOR)
        spank_job_control_setenv(spank, name, path, 1);
    return 0;
}

/* Under --multi-prog srun sends the text of the file argv[0] as argv[1], and before 24.11 the
 * tasks' own commands are out of a plugin's reach: they would run on the host. Nothing else shows
 * it. */
static void refuse_multi_prog(int argc, char **argv)
{
    char text[65536]; /* Slurm takes no file over 60000 bytes */
    struct stat status;
    int file;

    if (argc < 2 || stat(argv[0], &status) || !S_ISREG(status.st_mode) ||
        (size_t)status.st_size >= sizeof text || (file = open(argv[0], O_RDONLY)) < 0)
        return;
    ssize_t length = read(file, text, sizeof text - 1);
    close(file);
    text[length > 0 ? length : 0] = '\0';
    if (length > 0 && !strcmp(text, argv[1]))
        refuse("not with --multi-prog: start one srun per program instead");
}

int slurm_spank_local_user_init(spank_t spank, int ac, char **av)
{
    int argc;
    char **argv;

    if (getenv(EDF_VARIABLE) && !spank_get_item(spank, S_JOB_ARGV, &argc, &argv))
        refuse_multi_prog(argc, argv);
    return 0;
}

/* The batch script lies in slurmd's spool folder, which no image has: it enters as an open file. */
static char *open_script(const char *script)
{
    char path[32];
    int file = open(script, O_RDONLY);

    if (file < 0)
        refuse("%s: %s", script, strerror(errno));
    snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    return strdup(path);
}

int slurm_spank_task_init(spank_t spank, int ac, char **av)
{
    char edf[4096];
    char **argv;
    int argc;
    uint32_t step;

    if (spank_getenv(spank, EDF_VARIABLE, edf, sizeof edf) == ESPANK_ENV_NOEXIST)
        return 0;
    if (spank_get_item(spank, S_JOB_STEPID, &step) ||
        spank_get_item(spank, S_JOB_ARGV, &argc, &argv) || argc < 1)
        refuse("Slurm does not give the task's command");
    if (step > SLURM_MAX_NORMAL_STEP_ID && step != SLURM_BATCH_SCRIPT)
        return 0; /* salloc's interactive step stays on the host, where srun is */
    refuse_multi_prog(argc, argv);
    if (step == SLURM_BATCH_SCRIPT)
        argv[0] = open_script(argv[0]);

    const char *runner = setting("runner", ac, av);
#if SLURM_VERSION_NUMBER >= SLURM_VERSION_NUM(24, 11, 0)
    const char *words[] = {runner, "edf", "run", edf, "--"};
    if (spank_unsetenv(spank, EDF_VARIABLE) || spank_prepend_task_argv(spank, 5, words))
        refuse("Slurm does not take the runner");
#else
    /* The vector cannot grow, but argv[0] can be another program, which puts the words in front. */
    if (spank_setenv(spank, "POST_TRAINING_SPANK_RUNNER", runner, 1) ||
        spank_setenv(spank, "POST_TRAINING_SPANK_COMMAND", argv[0], 1))
        refuse("Slurm does not take the runner");
    argv[0] = strdup(setting("launcher", ac, av));
#endif
    return 0;
}
