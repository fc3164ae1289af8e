# SAC + SAM + Reset on DeepMind Control from pixels (Lee et al. 2023): one line per row of a table, one run per task.
# seeds: 10
#
#     python benchmark/launch.py benchmark/lists/sac_sam_reset.sh --core    # SAC with and without the method
#
# DMC-M's eleven tasks, 2M frames per run.
#
# GPU-hours per seed, estimated: 300 for the core set, 2,460 for all. A run of the whole method took 15 in the paper, or
# 8 where actions are repeated 4 times (7.1, an RTX 3090). All runs are counted so, and those without SAM are faster.
TASKS="acrobot-swingup cartpole-swingup_sparse cheetah-run finger-turn_easy finger-turn_hard hopper-hop quadruped-run
    quadruped-walk reacher-easy reacher-hard walker-run"
BASE="--no-sam --reset-every 0"

# Table 2. L2's row is the best of three weights.
for task in $TASKS; do
    python algos/sac_sam_reset.py --env-id $task --exp-name sac_base $BASE  # core
    python algos/sac_sam_reset.py --env-id $task --exp-name sac_sam --reset-every 0
    python algos/sac_sam_reset.py --env-id $task --exp-name sac_reset --no-sam
    python algos/sac_sam_reset.py --env-id $task --exp-name sac_sam_reset  # core
    for baseline in l2_1e-3 l2_1e-4 l2_1e-5 layer_norm crelu; do
        python benchmark/suites/ablations.py sac_sam_reset $baseline --env-id $task --exp-name sac_$baseline $BASE
    done
done

# Figure 3d: SAM's step for the loss of the critic or of the actor alone, without and with resets. Both is Table 2's.
for task in $TASKS; do
    for part in critic actor; do
        python algos/sac_sam_reset.py --env-id $task --exp-name ${part}_sam --sam-on $part --reset-every 0
        python algos/sac_sam_reset.py --env-id $task --exp-name ${part}_sam_reset --sam-on $part
    done
done

# The length of SAM's step, whose values are not legible in the paper; the default, its authors' code's, is 0.01 here.
for rho in 0.003 0.03 0.1; do
    python algos/sac_sam_reset.py --env-id quadruped-run --exp-name rho$rho --sam-rho $rho
done

# The authors' code: a smaller learning rate, and their later method, which adds layer normalisation and CReLU and lets
# SAM step in the encoder alone (`plastic` says what of it is there).
for task in $TASKS; do
    python algos/sac_sam_reset.py --env-id $task --exp-name code_base $BASE --learning-rate 1e-4
    python algos/sac_sam_reset.py --env-id $task --exp-name code_sam_reset --learning-rate 1e-4
    python benchmark/suites/ablations.py sac_sam_reset plastic --env-id $task --exp-name code_plastic \
        --learning-rate 1e-4
done
