# Coins, where the claims of two papers can be tested in minutes: one line per method, one run per seed.
# seeds: 10
#
#     python benchmark/launch.py benchmark/lists/coins.sh --core --workers 2    # skips finished runs
#
# benchmark/suites/coins.py says what the levels are and how long a run is. Hours per seed, on one core of a CPU with
# AVX2: core 0.14, measured; all about 1.9, in part estimated, of which 1.2 are those on the scripts' own network.
COINS=benchmark/suites/coins.py

# Xie et al. 2025, 4.1: agent 1's levels have the law, agent 2's do not. First with no distillation, which is PPO on
# each. Then with gradients to one side of the distillation alone, and with agent 1's levels for both.
python $COINS mdpo --env-id coins-law-free --exp-name apart --distill-coef 0  # core
python $COINS mdpo --env-id coins-law-free --exp-name mdpo  # core
python $COINS mdpo detached --env-id coins-law-free --exp-name detached  # core
python $COINS mdpo detached_own --env-id coins-law-free --exp-name detached_own
python $COINS mdpo --env-id coins-law --exp-name mdpo_law

# Lee et al. 2020, figure 3: trained on two backgrounds, what is the return on new ones? The last evaluation is of the
# Monte Carlo policy too.
python $COINS ppo_netrand --env-id coins-free --exp-name ppo --no-netrand  # core
python $COINS ppo_netrand --env-id coins-free --exp-name netrand  # core
python $COINS ppo_netrand --env-id coins-free --exp-name identity --clean-mode identity
for name in jitter cutout gray; do
    python $COINS ppo_netrand $name --env-id coins-free --exp-name $name
done

# Its appendix K: what does the method do where a colour says which end is right?
python $COINS ppo_netrand --env-id coins-colour --exp-name ppo_colour --no-netrand
python $COINS ppo_netrand --env-id coins-colour --exp-name netrand_colour
python $COINS ppo_netrand --env-id coins-colour --exp-name identity_colour --clean-mode identity

# Less of MDPO: a law that holds in 90 % of the episodes, and a tenth of the distillation.
python $COINS mdpo --env-id coins-law90-free --exp-name apart90 --distill-coef 0
python $COINS mdpo --env-id coins-law90-free --exp-name mdpo90
python $COINS mdpo --env-id coins-law-free --exp-name mdpo_alpha0.1 --distill-coef 0.1

# Does the answer depend on how it is learned: with a constant learning rate, with minibatches of 256, with both,
# rollouts of 64 and half the rate?
python $COINS mdpo --env-id coins-law-free --exp-name mdpo_constant --no-anneal-lr
python $COINS mdpo --env-id coins-law-free --exp-name mdpo_256 --num-minibatches 2 --total-timesteps 40960
SLOW="--num-steps 64 --no-anneal-lr --learning-rate 5e-4 --total-timesteps 40960"
python $COINS mdpo --env-id coins-law-free --exp-name apart_64 --distill-coef 0 $SLOW
python $COINS mdpo --env-id coins-law-free --exp-name mdpo_64 $SLOW

# On the scripts' own network.
OWN="--network script --learning-rate 5e-4"
python $COINS mdpo --env-id coins-law-free --exp-name apart_net --distill-coef 0 $OWN
python $COINS mdpo --env-id coins-law-free --exp-name mdpo_net $OWN
python $COINS mdpo detached --env-id coins-law-free --exp-name detached_net $OWN
python $COINS ppo_netrand --env-id coins-free --exp-name ppo_net --no-netrand $OWN
python $COINS ppo_netrand --env-id coins-free --exp-name netrand_net $OWN
