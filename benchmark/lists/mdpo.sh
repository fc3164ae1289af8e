# MDPO on Procgen (Xie et al. 2025): one line per curve of a figure, one run per game.
# seeds: 3, as in the authors' code
#
#     python benchmark/launch.py benchmark/lists/mdpo.sh --core    # MDPO and PPO; skips finished runs
#
# Hard mode, 500 levels, 50M steps per agent; meant for a GPU. All returns of the paper are in figures.
#
# GPU-hours per seed, estimated: 450 for the core set, 2,900 for all. The paper names its GPU (A100) and no times. A run
# of PPO is counted as 6 (Cobbe et al. 2020: 24 for 200M steps), one of MDPO as 22 (docs/speed.md: 3.7 times as long).
GAMES="bigfish bossfight caveflyer chaser climber coinrun dodgeball fruitbot heist jumper leaper maze miner ninja
    plunder starpilot"

# Figure 3 and appendix E.1: returns on unseen and on training levels. Table 1 and figures 4 and 13 to 15 use these
# runs: how far policies and encodings move under other colours. Figure 5: PPO with new heads on a frozen encoder of
# theirs; the paper does not name its games.
for game in $GAMES; do
    python algos/mdpo.py --env-id $game --exp-name mdpo  # core
    python algos/mdpo.py --env-id $game --exp-name ppo --num-agents 1  # core
    python benchmark/analyses/robustness.py PPO=@ppo/$game MDPO=@mdpo/$game --out @/robustness_$game.csv \
        --images @/perturbed_$game.png
    python benchmark/analyses/tsne.py PPO=@ppo/$game MDPO=@mdpo/$game --out @/tsne_$game.png
    for encoder in mdpo ppo; do
        python benchmark/suites/ablations.py mdpo frozen --env-id $game --exp-name frozen_$encoder \
            --encoder @$encoder/$game
    done
done

# Figures 10 and 11: Simple Policy Optimization in place of PPO.
for game in $GAMES; do
    python algos/mdpo.py --env-id $game --exp-name mdpo_spo --policy-loss spo
    python algos/mdpo.py --env-id $game --exp-name spo --num-agents 1 --policy-loss spo
done

# Figures 6 and 12: PPO with network, batch and steps doubled. The paper does not say how the network is doubled: twice
# as wide, or so much wider that it has as many weights as two. It names no game but fruitbot.
DOUBLED="--num-agents 1 --num-envs 128 --total-timesteps 100000000"
for game in $GAMES; do
    for network in doubled doubled_equal; do
        python benchmark/suites/ablations.py mdpo $network --env-id $game --exp-name ppo_$network $DOUBLED
    done
done

# Not in the paper: two agents that never learn from each other, so that all that MDPO adds is gone.
for game in $GAMES; do
    python algos/mdpo.py --env-id $game --exp-name apart --distill-coef 0
done

# The authors' code evaluates after each iteration, on about ten episodes.
for game in $GAMES; do
    python algos/mdpo.py --env-id $game --exp-name mdpo_code --eval-every 16384 --eval-episodes 10
    python algos/mdpo.py --env-id $game --exp-name ppo_code --num-agents 1 --eval-every 16384 --eval-episodes 10
done
