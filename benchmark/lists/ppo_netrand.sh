# Network randomization on Procgen (Lee et al. 2020): one line per method, one run per game.
# seeds: 3, as in mixreg's comparison
#
#     python benchmark/launch.py benchmark/lists/ppo_netrand.sh --core    # CoinRun, with and without the method
#
# Hard mode, 500 levels, 25M steps; meant for a GPU. --plain-look trains on one look and evaluates on the full one
# too, in place of the paper's split of old CoinRun's themes.
#
# GPU-hours per seed, estimated: 7 for the core set, 580 for all. No source states the method's own. A run of PPO is
# counted as 3 (Cobbe et al. 2020: 24 for 200M steps), one of the method as 4 (docs/speed.md: 1.36 times as long).
#
# No line: DeepMind Lab and Surreal robotics, environments that no script here has; appendix K's game, of which we found
# no description; image classification, which has no agent; cycle-consistency, in whose place looks.py has a distance.

# CoinRun across looks: the method, PPO, and PPO with other regularisers. Figure 3 uses the first two: what they make of
# a look that they never saw, and (3d) the policy that averages over 1 to 20 random kernels.
python algos/ppo_netrand.py --env-id coinrun --exp-name netrand --plain-look  # core
python algos/ppo_netrand.py --env-id coinrun --exp-name ppo --no-netrand --plain-look  # core
python benchmark/analyses/looks.py PPO=@ppo/coinrun netrand=@netrand/coinrun --out @/.
python benchmark/analyses/mc_samples.py @netrand/coinrun --out @/mc_samples.csv
for name in gray cutout inversion jitter dropout batch_norm l2; do
    python benchmark/suites/ablations.py ppo_netrand $name --env-id coinrun --exp-name ppo_$name \
        --no-netrand --plain-look
done

# The parts of the method: no feature matching; the paper's norm, a sum over 256 features where the code has their mean;
# the share of clean iterations (0.1 is above); a clean iteration with an identity kernel, as in the paper's formula.
python algos/ppo_netrand.py --env-id coinrun --exp-name no_matching --fm-coef 0 --plain-look
python algos/ppo_netrand.py --env-id coinrun --exp-name matching256 --fm-coef 0.512 --plain-look
for prob in 0 0.5 1; do
    python algos/ppo_netrand.py --env-id coinrun --exp-name clean$prob --clean-prob $prob --plain-look
done
python algos/ppo_netrand.py --env-id coinrun --exp-name identity --clean-mode identity --plain-look

# Across levels, in CoinRun and in the games of mixreg's comparison, where the method is reported to do
# badly.
for game in coinrun caveflyer climber dodgeball fruitbot jumper starpilot; do
    python algos/ppo_netrand.py --env-id $game --exp-name netrand_levels
    python algos/ppo_netrand.py --env-id $game --exp-name ppo_levels --no-netrand
done

# A task in which colours mean something, in place of the appendix's: a key opens the lock of its colour alone.
python algos/ppo_netrand.py --env-id heist --exp-name netrand_colours
python algos/ppo_netrand.py --env-id heist --exp-name ppo_colours --no-netrand

# Across levels over the 200M steps of Procgen's hard protocol.
for game in coinrun caveflyer climber dodgeball fruitbot jumper starpilot; do
    python algos/ppo_netrand.py --env-id $game --exp-name netrand_200m --total-timesteps 200000000
    python algos/ppo_netrand.py --env-id $game --exp-name ppo_200m --no-netrand --total-timesteps 200000000
done

# The authors' code on old CoinRun: raw rewards, a learning rate and a clip range that fall to 0, 32 environments, 256M
# steps.
OLD="--no-norm-reward --anneal-lr --anneal-clip --num-envs 32 --total-timesteps 256000000"
python algos/ppo_netrand.py --env-id coinrun --exp-name netrand_code --plain-look $OLD
python algos/ppo_netrand.py --env-id coinrun --exp-name ppo_code --no-netrand --plain-look $OLD
