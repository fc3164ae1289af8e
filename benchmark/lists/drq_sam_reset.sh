# DrQ + SAM + Reset on Atari-100k (Lee et al. 2023): one line per row of a table or point of a figure, one run per game.
# seeds: 10
#
#     python benchmark/launch.py benchmark/lists/drq_sam_reset.sh --core --runs-per-gpu 3    # skips finished runs
#
# The core set is DrQ with SAM, with resets, with both and with neither. 100,000 steps per run.
#
# GPU-hours per seed, estimated: 104 for the core set, 2,540 for all without adaptation.py, whose time nobody states. A
# run of the whole method took 1 in the paper, three at a time on an RTX 3090 (7.1), 1.9 and 3.8 at replay ratios 4 and
# 8 (Table 3); 0.5 at replay ratio 1 is our guess. All runs are counted so, and those without SAM are faster.
#
# No line: Table 3's other methods; Tr(F) in Table 6, because sharpness.py measures the weights that learn and not their
# average.
GAMES="alien amidar assault asterix bank_heist battle_zone boxing breakout chopper_command crazy_climber demon_attack
    freeway frostbite gopher hero jamesbond kangaroo krull kung_fu_master ms_pacman pong private_eye qbert road_runner
    seaquest up_n_down"
BASE="--no-sam --reset-every 0"

# Table 1, DrQ. L2's row is the best of three weights. sharpness.py: its columns of curvature.
for game in $GAMES; do
    python algos/drq_sam_reset.py --env-id $game --exp-name drq_base $BASE  # core
    python algos/drq_sam_reset.py --env-id $game --exp-name drq_sam --reset-every 0  # core
    python algos/drq_sam_reset.py --env-id $game --exp-name drq_reset --no-sam  # core
    python algos/drq_sam_reset.py --env-id $game --exp-name drq_sam_reset  # core
    for baseline in l2_1e-3 l2_1e-4 l2_1e-5 layer_norm crelu; do
        python benchmark/suites/ablations.py drq_sam_reset $baseline --env-id $game --exp-name drq_$baseline $BASE
    done
    python benchmark/analyses/sharpness.py @drq_{base,sam,reset,sam_reset}/$game \
        @drq_{l2_1e-3,l2_1e-4,l2_1e-5,layer_norm,crelu}/$game --out @/sharpness_drq_$game.csv
done

# Table 1, DER, of which the paper says only that it "optimizes its hyperparameters": DrQ's settings without
# augmentation, and DER's own (one update per step, another target network, 1,600 random steps).
for game in $GAMES; do
    python algos/drq_sam_reset.py --env-id $game --exp-name der_base --no-augment $BASE
    python algos/drq_sam_reset.py --env-id $game --exp-name der_sam --no-augment --reset-every 0
    python algos/drq_sam_reset.py --env-id $game --exp-name der_reset --no-augment --no-sam
    python algos/drq_sam_reset.py --env-id $game --exp-name der_sam_reset --no-augment
    for baseline in l2_1e-3 l2_1e-4 l2_1e-5 layer_norm crelu; do
        python benchmark/suites/ablations.py drq_sam_reset $baseline --env-id $game --exp-name der_$baseline \
            --no-augment $BASE
    done
    python benchmark/analyses/sharpness.py @der_{base,sam,reset,sam_reset}/$game \
        @der_{l2_1e-3,l2_1e-4,l2_1e-5,layer_norm,crelu}/$game --out @/sharpness_der_$game.csv
    python benchmark/suites/ablations.py drq_sam_reset der --env-id $game --exp-name der1905_base
    python benchmark/suites/ablations.py drq_sam_reset der --env-id $game --exp-name der1905_sam --sam
    python benchmark/suites/ablations.py drq_sam_reset der --env-id $game --exp-name der1905_reset --reset-every 40000
    python benchmark/suites/ablations.py drq_sam_reset der --env-id $game --exp-name der1905_sam_reset \
        --sam --reset-every 40000
done

# Figure 2: new inputs and new labels, without reinforcement learning. It has seeds of its own, and is run once. It
# downloads CIFAR-10; without a network its images are made up, and all of its output says so.
python benchmark/analyses/adaptation.py --optimizers sgd --out @/adaptation.csv --plot @/adaptation.png

# Table 4 prints Adam's epsilon as 1.5e-5; the code's, which is the default, is 1.5e-4.
for game in $GAMES; do
    python algos/drq_sam_reset.py --env-id $game --exp-name epsilon_base --adam-eps 1.5e-5 $BASE
    python algos/drq_sam_reset.py --env-id $game --exp-name epsilon_sam_reset --adam-eps 1.5e-5
done

# Table 3 and figure 6: more updates per step. Where there are resets, they shrink and perturb the backbone too.
SHRINK="--shrink-perturb 0.8"
for game in $GAMES; do
    python algos/drq_sam_reset.py --env-id $game --exp-name rr2_sam_reset $SHRINK
    python algos/drq_sam_reset.py --env-id $game --exp-name rr2_reset --no-sam $SHRINK
    for ratio in 4 8; do
        python algos/drq_sam_reset.py --env-id $game --exp-name rr${ratio}_base --replay-ratio $ratio $BASE
        python algos/drq_sam_reset.py --env-id $game --exp-name rr${ratio}_sam --replay-ratio $ratio --reset-every 0
        python algos/drq_sam_reset.py --env-id $game --exp-name rr${ratio}_reset --replay-ratio $ratio --no-sam $SHRINK
        python algos/drq_sam_reset.py --env-id $game --exp-name rr${ratio}_sam_reset --replay-ratio $ratio $SHRINK
    done
done

# Table 6: averaged weights, with and without resets.
for game in $GAMES; do
    python benchmark/suites/ablations.py drq_sam_reset swa --env-id $game --exp-name swa $BASE
    python benchmark/suites/ablations.py drq_sam_reset swa --env-id $game --exp-name swa_reset \
        --no-sam --reset-every 40000
done

# Section 5.4: SAM with CReLU in place of resets. Figure 3b: the noise of SAM's two passes. Figure 3c: which parameters
# take the step. Each without and with resets; the default of both is Table 1's.
for game in $GAMES; do
    python benchmark/suites/ablations.py drq_sam_reset crelu --env-id $game --exp-name sam_crelu --sam --reset-every 0
    for noise in reuse none; do
        python algos/drq_sam_reset.py --env-id $game --exp-name noise_${noise}_sam --sam-noise $noise --reset-every 0
        python algos/drq_sam_reset.py --env-id $game --exp-name noise_${noise}_sam_reset --sam-noise $noise
    done
    for scope in backbone head; do
        python algos/drq_sam_reset.py --env-id $game --exp-name ${scope}_sam --sam-scope $scope --reset-every 0
        python algos/drq_sam_reset.py --env-id $game --exp-name ${scope}_sam_reset --sam-scope $scope
    done
done

# Figure 4: the length of SAM's step, and the batch size. 0.1 and 32 are Table 1's.
for game in $GAMES; do
    for rho in 0.03 0.3; do
        python algos/drq_sam_reset.py --env-id $game --exp-name rho${rho}_sam --sam-rho $rho --reset-every 0
        python algos/drq_sam_reset.py --env-id $game --exp-name rho${rho}_sam_reset --sam-rho $rho
    done
    for batch in 16 64; do
        python algos/drq_sam_reset.py --env-id $game --exp-name batch${batch}_base --batch-size $batch $BASE
        python algos/drq_sam_reset.py --env-id $game --exp-name batch${batch}_sam --batch-size $batch --reset-every 0
        python algos/drq_sam_reset.py --env-id $game --exp-name batch${batch}_reset --batch-size $batch --no-sam
        python algos/drq_sam_reset.py --env-id $game --exp-name batch${batch}_sam_reset --batch-size $batch
    done
done

# The authors' code: a greater learning rate, and more of the backbone replaced.
RATE="--learning-rate 1.414e-4"
SHRINK="--shrink-perturb 0.6"
for game in $GAMES; do
    python algos/drq_sam_reset.py --env-id $game --exp-name code_base $BASE $RATE
    python algos/drq_sam_reset.py --env-id $game --exp-name code_sam_reset $RATE
    for ratio in 4 8; do
        python algos/drq_sam_reset.py --env-id $game --exp-name code_rr$ratio --replay-ratio $ratio $SHRINK $RATE
    done
done

# The authors' six scripts, of their later method: layer normalisation and resets (dagger), and CReLU and SAM besides.
# plastic_code has SAM as their code has it, plastic as their paper has it.
for game in $GAMES; do
    for method in plastic plastic_code plastic_dagger; do
        python benchmark/suites/ablations.py drq_sam_reset $method --env-id $game --exp-name ${method}_rr2
        for ratio in 4 8; do
            python benchmark/suites/ablations.py drq_sam_reset $method --env-id $game --exp-name ${method}_rr$ratio \
                --replay-ratio $ratio $SHRINK
        done
    done
done
